"""Locks between processes."""

import errno
import fcntl
import subprocess
import sys

import pytest

from dist_lars.errors import UserError
from dist_lars.locks import lock

HOLD = """
import sys
from pathlib import Path
from dist_lars.locks import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_of_another_process_is_seen_and_ends_with_it(tmp_path):
    path = tmp_path / "lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError):
        lock(path)
    other.kill()
    other.communicate()
    with lock(path):
        pass


def test_waiting_returns_when_the_other_lets_go(tmp_path):
    path = tmp_path / "lock"
    first = lock(path)
    waiting = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("(sys.argv[1])", "(sys.argv[1]), wait=True"), str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.5)
    first.close()
    assert waiting.stdout.readline() == "held\n"
    waiting.communicate()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    """Mocked: no such file system can be mounted here."""

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / "lock"):
        pass
    assert f"{tmp_path} is on a file system without locks (No locks available)" in capsys.readouterr().err
    with pytest.raises(UserError, match="and several jobs cannot share it"):
        lock(tmp_path / "x", needed=True)
