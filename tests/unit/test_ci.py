""".ci/run on a Makefile of our own: what it calls, that its time is limited, and that nothing outlives it."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAKEFILE = """
fine fails:
\t@echo "CI=$$CI"; test $@ = fine
stray:
\t@setsid sleep 7654 & echo $$! >$(CURDIR)/../pid
endless:
\tsleep 7654
test-once:
\t@test -n "$(ARGS)" && echo "again $(ARGS)"
test-never:
\t@false
"""


@pytest.fixture
def ci(tmp_path):
    """`ci("target", NAME=value)` -> (exit code, output, the lines of minutes)."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    (clone / "Makefile").write_text(MAKEFILE)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "all")):
        subprocess.run([*git, *words], cwd=clone, check=True)

    def run(*targets, **extra):
        done = subprocess.run(
            [clone / ".ci/run", *targets], env={**os.environ, **extra}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, re.findall(r"^make (\S+) +[\d.]+ minutes *(.*)$", done.stdout, re.M)

    return run


def test_one_failure_does_not_hide_the_next(ci):
    code, output, minutes = ci("fails", "fine")
    assert (code, minutes) == (1, [("fails", "FAILED"), ("fine", "")])
    assert "CI=true" in output
    assert ci("fine")[0] == 0


def test_tests_that_fail_are_tried_again_and_it_is_said(ci):
    code, output, minutes = ci("test-once", "fine")
    assert (code, minutes) == (0, [("test-once", "with a second try"), ("fine", "")])
    assert "again --last-failed" in output
    code, _, minutes = ci("test-never")
    assert (code, minutes) == (1, [("test-never", "FAILED")])


def test_all_of_it_has_a_limit(ci):
    began = time.monotonic()
    code, _, minutes = ci("endless", CI_MINUTES="0")
    assert (code, minutes) == (1, [("endless", "OUT OF TIME")])
    assert time.monotonic() - began < 60


@pytest.mark.skipif(os.geteuid() != 0, reason="without root it has no namespace of its own: run it as root")
def test_no_process_outlives_it(ci, tmp_path):
    assert ci("stray")[0] == 0
    assert (tmp_path / "pid").read_text().strip().isdigit()
    running = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            running.append(path.read_bytes().split(b"\0"))
    assert any(b"pytest" in words for words in running)  # which shows that it looks
    assert not [words for words in running if b"7654" in words]


def test_every_target_of_the_tests_is_called_or_named():
    """What CI does not do is said in its first lines."""
    script = (ROOT / ".ci/run").read_text()
    (default,) = re.findall(r"^\[ \$# -gt 0 \] \|\| set -- (.*)$", script, re.M)
    by_hand = re.search(r"only these; (.*) (?:is|are) run by hand", script)[1]
    targets = set(re.findall(r"^(test[\w-]*): install", (ROOT / "Makefile").read_text(), re.M))
    assert {*default.split(), *re.findall(r"test[\w-]*", by_hand)} == {*targets, "install", "lint"}
    assert {"test", "test-studies", "test-faults", "test-cluster", "test-hosts", "test-docker"} < set(default.split())
