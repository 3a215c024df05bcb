"""Reasons to stop, durations, and a watchdog that really ends a stuck process."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from dist_lars.errors import UserError
from dist_lars.rules import seconds_of
from dist_lars.stopping import MARGIN, StopNotes, deadline, slurm_end


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("01:55:00", 6900), ("1-12", 129600), ("1-12:30", 131400), ("2-00:00:05", 172805)],
)
def test_durations_as_slurm_writes_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "1.5h", "-3"])
def test_other_durations_are_refused(text):
    with pytest.raises(UserError, match="must be a duration such as 01:55:00"):
        seconds_of(text)


def test_a_signal_is_noted_and_a_second_one_ends_the_process():
    code = (
        "import os, signal, sys, time; from dist_lars.stopping import StopNotes; n = StopNotes(); n.listen();"
        "print(n.reason(), flush=True); os.kill(os.getpid(), signal.{0}); time.sleep(.1);"
        "print(n.reason(), flush=True);"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9); print('still here')"
    )
    for name in ("SIGTERM", "SIGUSR2"):
        done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, timeout=20)
        assert done.stdout.split("\n") == ["None", f"signal {name}", ""]
        assert done.returncode == 75


def test_a_stop_file_and_the_clock(tmp_path):
    notes = StopNotes(tmp_path / "STOP", deadline=time.time() + 100 + MARGIN)
    assert notes.reason(needed=90) is None
    assert notes.reason(needed=110) == "time limit"
    (tmp_path / "STOP").touch()
    assert notes.reason() == "file STOP"
    (tmp_path / "STOP").write_text("asked to stop by SIGUSR2\n")
    assert notes.reason() == "file STOP, which says: asked to stop by SIGUSR2"


def test_the_earlier_limit_counts():
    assert deadline(None, 1000.0, {}) is None
    assert deadline("10", 1000.0, {}) == 1600
    assert deadline("10", 1000.0, {"SLURM_JOB_END_TIME": "1500"}) == 1500
    assert deadline("5", 1000.0, {"SLURM_JOB_END_TIME": "1500"}) == 1300


def test_slurms_end_is_asked_where_the_environment_is_silent():
    def scontrol(words, **_):
        assert words[:4] == ["scontrol", "show", "job", "7"]
        return SimpleNamespace(stdout="JobId=7 StartTime=2026-01-02T03:04:05 EndTime=2026-01-02T05:04:05 Deadline=N/A")

    expected = time.mktime((2026, 1, 2, 5, 4, 5, 0, 0, -1))
    assert slurm_end({"SLURM_JOB_ID": "7"}, scontrol) == expected
    assert slurm_end({"SLURM_JOB_ID": "7"}, lambda *_, **__: SimpleNamespace(stdout="EndTime=Unknown")) is None
    assert slurm_end({}, scontrol) is None


WATCHED = """
import sys, time
from pathlib import Path
from dist_lars.watchdog import Watchdog
dog = Watchdog(3, Path(sys.argv[1]), 1.0, lambda text: Path(sys.argv[1] + ".told").write_text(text))
dog.start()
for i in range(4):
    time.sleep(0.5)
    dog.beat(f"step {i}")
print("alive", flush=True)
if sys.argv[2] == "stop":
    dog.stop()
    time.sleep(2.5)
    sys.exit(0)
def stuck_here():
    time.sleep(30)
stuck_here()
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """{case: (the process after its end, where its stacks would lie, seconds)}, all at once: they only wait."""
    folder = tmp_path_factory.mktemp("watched")
    cases = {"hang": folder / "hang", "no disk": folder / "gone" / "stacks", "stop": folder / "stop"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    start = time.monotonic()
    begun = {
        case: subprocess.Popen([sys.executable, "-c", WATCHED, str(stacks), case], **pipes)
        for case, stacks in cases.items()
    }
    ended = {}
    for case, process in begun.items():
        out, err = process.communicate(timeout=40)
        done = subprocess.CompletedProcess(case, process.returncode, out, err)
        ended[case] = done, cases[case], time.monotonic() - start
    return ended


def test_a_stuck_rank_dumps_its_stacks_and_ends(watched):
    done, stacks, seconds = watched["hang"]
    assert done.stdout == "alive\n"
    assert done.returncode == 1
    assert seconds < 15
    assert "error: rank 3 on " in done.stderr
    assert "made no progress for 1 s while step 3" in done.stderr
    assert "stuck_here" in stacks.read_text() or "<module>" in stacks.read_text()
    assert "no progress" in stacks.with_suffix(".told").read_text()


def test_a_stuck_rank_ends_with_its_message_where_nothing_can_be_written(watched):
    done, _, seconds = watched["no disk"]
    assert done.returncode == 1
    assert seconds < 15  # not by the backstop, which has no words
    assert "error: rank 3 on " in done.stderr
    assert "made no progress for 1 s while step 3" in done.stderr
    assert "most recent call first" in done.stderr  # the stacks, where they can be read at all


def test_a_watchdog_that_was_stopped_ends_nothing(watched):
    done, *_ = watched["stop"]
    assert (done.returncode, done.stderr) == (0, "")


def test_the_limit_follows_the_longest_step(tmp_path):
    from dist_lars.watchdog import Watchdog

    dog = Watchdog(0, tmp_path / "s", None, print)
    assert dog.limit() == 300
    dog.longest = 20
    assert dog.limit() == 600
