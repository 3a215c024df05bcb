"""The run log on a disk that is full."""

import io

import pytest

from dist_lars import runlog
from dist_lars.runlog import RunLog


def full_log(folder, **options):
    """A log whose lines go to /dev/full, which refuses every byte."""
    (folder / "log.jsonl").symlink_to("/dev/full")
    return RunLog(folder, tensorboard=False, progress=False, **options)


def test_a_full_disk_is_an_error(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        full_log(tmp_path).line("train", step=1)


def test_a_patient_log_keeps_its_lines_until_there_is_room(tmp_path, capsys):
    log = full_log(tmp_path, patient=True)
    log.line("train", step=1)
    log.line("train", step=2)
    assert capsys.readouterr().err.count("warning: log.jsonl could not be written: No space left on device") == 1
    (tmp_path / "log.jsonl").unlink()
    log.file = (tmp_path / "log.jsonl").open("ab", buffering=0)
    log.line("train", step=3)
    log.close()
    assert [line["step"] for line in runlog.read(tmp_path)] == [1, 2, 3]


def test_a_line_that_is_taken_in_parts_is_written_whole(tmp_path):
    """As a disk does that is just filling up."""

    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:5])

    log = RunLog(tmp_path, tensorboard=False, progress=False)
    log.file = Short(tmp_path / "log.jsonl", "ab")
    log.line("train", step=1)
    assert [line["step"] for line in runlog.read(tmp_path)] == [1]


def test_half_a_line_is_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert [line["step"] for line in runlog.read(tmp_path)] == [1]


@pytest.mark.parametrize(
    "left", [b'{"kind": "tra', b"\0\0\0", b'{"kind": "train", "step": 9', b"\xff\n", b'{"kind": "start", "plan": {}']
)
def test_what_a_killed_job_left_costs_no_line_of_the_next(tmp_path, left):
    """Half a line stays in the middle of the log for ever."""
    whole = b'{"kind": "train", "step": 1}\n'
    (tmp_path / "log.jsonl").write_bytes(whole + left)
    for step in (2, 3):
        log = RunLog(tmp_path, tensorboard=False, progress=False)
        log.line("train", step=step)
        log.close()
    assert [line["step"] for line in runlog.read(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "log.jsonl").read_bytes().startswith(whole + left)
    assert b"\n\n" not in (tmp_path / "log.jsonl").read_bytes()


def test_the_first_failure_of_a_job_is_its_last_word(tmp_path):
    """The other ranks fail, too, when their connections close, or rank 0 has just saved: neither is the cause."""
    (tmp_path / "status.json").write_bytes(b"\0\0")  # of a host that lost its power
    for started in ("one", "two"):
        runlog.write_status(tmp_path, "running", started, step=1)
        runlog.write_status(tmp_path, "failed", started, rank=3, reason="cannot read image X")
        runlog.write_status(tmp_path, "failed", started, rank=0, reason="connection closed by peer")
        runlog.write_status(tmp_path, "running", started, step=2)
        status = runlog.read_status(tmp_path)
        assert (status["state"], status["rank"], status["reason"]) == ("failed", 3, "cannot read image X")
    runlog.write_status(tmp_path, "finished", "three", step=3)
    assert runlog.read_status(tmp_path)["state"] == "finished"


def test_waiting_for_data_is_told_once_per_spell(tmp_path, capsys):
    log = RunLog(tmp_path, tensorboard=False, progress=False)
    log.advice = "take more workers"
    for share in (0.5, 0.5, 0.5, 0.05, 0.1, 0.11):  # the first interval, in which workers start, says nothing
        log.waited(share)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "50% of the time goes into waiting for data: take more workers",
        "11% of the time goes into waiting for data: take more workers",
    ]
    assert [line["data_wait"] for line in runlog.read(tmp_path, "advice")] == [0.5, 0.11]
