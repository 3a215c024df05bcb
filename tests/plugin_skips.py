"""Under CI a skipped test fails, unless its reason is something that no installation could change.

conftest.py imports these hooks. A skip like "Horovod is not installed" is right on a laptop and
hides a missing install step in CI.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

# A skip's reason must contain one of these words to pass in CI: what `make install` cannot bring.
ALLOWED = ("GPU", "CUDA", "DIST_LARS_SAMPLES", "small tmpfs", "MPI_HOME")


def refused(report: Any) -> str | None:
    """Why this skip is a failure here, if it is one."""
    if os.environ.get("CI", "") in ("", "0", "false") or not report.skipped or hasattr(report, "wasxfail"):
        return None
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if any(word in reason for word in ALLOWED):
        return None
    return f"skipped under CI: {reason!r}. Let `make install` bring what is missing, or add it to {__name__}.ALLOWED"


def fail_if_refused(report: Any) -> Any:
    """The report, turned into a failure where the skip is none that CI allows."""
    if why := refused(report):
        report.outcome, report.longrepr = "failed", why
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """A test that skipped itself."""
    return fail_if_refused((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """A file that skipped itself, as importorskip does."""
    return fail_if_refused((yield))
