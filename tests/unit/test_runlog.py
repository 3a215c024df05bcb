"""The run log on a disk that is full."""

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


def test_half_a_line_is_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert [line["step"] for line in runlog.read(tmp_path)] == [1]


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
