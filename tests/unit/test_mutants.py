"""The rows of tests/mutants.py fit the code: one that no longer does guards nothing."""

import pytest

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.old.strip()[:40]}")
def test_a_row_fits_the_code(mutant):
    assert (mutants.ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert (mutants.ROOT / mutant.test.partition("::")[0]).exists()
