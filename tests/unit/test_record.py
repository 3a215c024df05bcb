"""What every benchmark relies on: the timer, the statistics, the record and what is read from it."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import record, show


def test_candidates_are_timed_in_turn() -> None:
    calls: list[str] = []
    times = record.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=5, warmup=0)
    assert calls == ["a", "b"] * 5
    assert [len(v) for v in times.values()] == [5, 5]


@pytest.mark.parametrize(
    ("takes", "timed"),
    [
        ([5.0, 3.0, 1.0, 1.01, 7.0, 8.0, 9.0], [7.0, 8.0, 9.0]),
        ([2.0**-i for i in range(9)], [2.0**-i for i in (4, 5, 6)]),
    ],
    ids=["until steady", "at most so many"],
)
def test_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch, takes: list[float], timed: list[float]) -> None:
    seconds = iter(takes)
    monkeypatch.setattr(record, "clock", lambda function, synchronize: next(seconds))
    assert record.compare({"step": lambda: None}, rounds=3, warmup=4) == {"step": timed}


def test_time_limit_leaves_at_least_three_rounds() -> None:
    times = record.compare({"slow": lambda: time.sleep(0.01)}, rounds=50, seconds=0.0, warmup=0)
    assert len(times["slow"]) == 3


def test_device_is_idle_before_and_after() -> None:
    order: list[str] = []
    record.clock(lambda: order.append("work"), lambda: order.append("wait"))
    assert order == ["wait", "work", "wait"]


def test_statistics() -> None:
    row = record.summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (row["n"], row["median"], row["p10"], row["p90"]) == (5, 3.0, 1.4, 4.6)
    assert 1.0 <= row["low"] <= 3.0 <= row["high"] <= 5.0
    assert record.summary([2.0] * 4) == {"n": 4, "median": 2.0, "p10": 2.0, "p90": 2.0, "low": 2.0, "high": 2.0}


def test_ratios_are_taken_round_by_round() -> None:
    """Both candidates slow down tenfold in one round: the ratio of that round is what it always is."""
    assert record.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])["p90"] == 2.0


def test_record_is_read_back_and_says_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "0.5")
    monkeypatch.setenv("HOROVOD_HOSTNAME", "secret-host")
    monkeypatch.setenv("HOROVOD_LOG_DIR", "/home/someone/logs")
    monkeypatch.setenv("OMPI_MCA_pml", "ob1")
    monkeypatch.setenv("OMPI_MCA_initial_wdir", "/somewhere")  # Open MPI's launcher tells its ranks
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    rows = [{"name": "a", "ms": 1.23456789}]
    path = record.write("try", rows, {"a": [0.00123456789]}, folder=tmp_path, note="by the way")
    assert [p.name for p in tmp_path.iterdir()] == ["try.json"]  # nothing of the writing is left behind
    body = record.read("try", tmp_path)
    assert body["rows"] == rows
    assert body["raw_seconds"] == {"a": [0.00123457]}
    assert body["note"] == "by the way"
    assert {"name", "date", "command", "git", "versions", "machine", "environment"} <= set(body)
    assert {"python", "torch", "numpy"} <= set(body["versions"])
    assert body["machine"]["cores"] >= 1
    assert (body["environment"]["OMP_NUM_THREADS"], body["environment"]["HOROVOD_CYCLE_TIME"]) == ("1", "0.5")
    assert body["environment"]["OMPI_MCA_pml"] == "ob1"
    assert not body["environment"].keys() & {"OMPI_MCA_initial_wdir", "OMPI_COMM_WORLD_RANK"}
    text = path.read_text()
    assert "secret-host" not in text
    assert "/home/" not in text
    assert os.uname().nodename not in text


@pytest.mark.parametrize("words", [["--hosts", "secret1:2,secret2:2"], ["--hosts=secret1:2,secret2:2"]])
def test_a_command_names_no_hosts(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *words, "--batch", "4"])
    assert record.command().endswith("--hosts host1:2,host2:2 --batch 4")


def test_paths_are_shortened_and_other_words_are_not() -> None:
    shorten = record._without_folders
    assert shorten("/a/b/file.json") == "file.json"
    assert shorten("--data=/a/b/images") == "--data=images"
    assert shorten("--ratio 1/2 benchmarks/records") == "--ratio 1/2 benchmarks/records"


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    record.write("try", [{"a": 1}], {}, folder=tmp_path)
    with pytest.raises(TypeError):
        record.write("try", [{"a": object()}], {}, folder=tmp_path)
    assert record.read("try", tmp_path)["rows"] == [{"a": 1}]


def test_markdown() -> None:
    table = show.markdown([{"name": "a", "ms": 12.3456, "n": 3}, {"name": "b", "ms": 0.00123456, "n": None}])
    assert table.splitlines() == [
        "| name | ms | n |",
        "| --- | ---: | ---: |",
        "| a | 12.3 | 3 |",
        "| b | 0.00123 |  |",
    ]


@pytest.mark.parametrize("kind", ["bar", "line"])
def test_plot_writes_a_png(tmp_path: Path, kind: str) -> None:
    rows = [{"x": x, "y": x * s, "of": str(s), "low": x * s * 0.9, "high": x * s * 1.1} for x in (1, 2) for s in (1, 3)]
    path = show.plot(rows, tmp_path / "p.png", x="x", y="y", series="of", kind=kind, references={"one": 1.0})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_stored_records_are_complete() -> None:
    for path in record.RECORDS.glob("*.json"):
        body = json.loads(path.read_text())
        assert {"name", "date", "command", "git", "versions", "machine", "rows", "raw_seconds"} <= set(body), path.name
        assert body["name"] == path.stem
