"""A skip that hides a missing install step fails under CI, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = """
import pytest
def test_gpu(): pytest.skip("needs a GPU")
def test_horovod(): pytest.skip("Horovod is not installed")
def test_nodes(): pytest.skip("network namespaces need root")
@pytest.mark.xfail
def test_known(): assert False
"""


@pytest.mark.parametrize(
    ("ci", "summary"), [("true", "2 failed, 1 skipped, 1 xfailed, 1 error"), ("", "4 skipped, 1 xfailed")]
)
def test_skips(tmp_path, ci, summary):
    (tmp_path / "test_some.py").write_text(FILE)
    (tmp_path / "test_whole_file.py").write_text("import pytest\npytest.importorskip('no_such_module')")
    hooks = "pytest_make_collect_report, pytest_runtest_makereport"
    (tmp_path / "conftest.py").write_text(f"from plugin_skips import {hooks}\n")
    env = {**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    words = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
             "--continue-on-collection-errors", str(tmp_path)]  # fmt: skip
    run = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert summary in run.stdout.splitlines()[-1]
    if ci:
        assert "Horovod is not installed" in run.stdout
        assert "Let `make install` bring what is missing" in run.stdout
