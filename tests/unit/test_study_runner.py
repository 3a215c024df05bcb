"""What a study takes up next, without training anything."""

import sys

import pytest
from study_tools import TINY, finish, study

from benchmarks import study as command
from benchmarks import study_report, study_store


def runner(wanted, folder, *words):
    args, _ = command.parse(
        [str(folder / "tiny.yaml"), "--records", str(folder / "records"), "--work", str(folder / "work"), *words]
    )
    return command.Runner(wanted, study_store.Store(args.records, wanted.name), args)


@pytest.fixture
def other(tmp_path):
    """A study with records, of whose cells one is asked by another study under another name."""
    wanted = study(tmp_path, name="other")
    store = study_store.Store(tmp_path / "records", "other")
    for line in finish(wanted, lambda run: 80 - 10 * abs(run.factor - 1)).values():
        line = {k: v for k, v in line.items() if k != "kind"}
        store.add(line, {"machine": {"cpu": "abacus"}}, study_report.header(wanted))
    return store


MINE = {"batch_size": [64], "arm": {**TINY["axes"]["arm"], "Nesterov": {"optim.name": "nesterov"}}}


def test_a_run_that_another_study_has_recorded_is_not_trained_again(tmp_path, other, capsys):
    mine = runner(study(tmp_path, axes=MINE), tmp_path)
    assert mine._next().cell.key == "64 | Nesterov"
    found = mine.store.runs()
    assert len(found) == 2 * 3  # both sweeps; finals wait for the third arm
    assert {run["on"] for run in found.values()} == {line["id"] for line in other.lines() if line["kind"] == "machine"}
    assert capsys.readouterr().out.count("taken from another study's records") == 6


def test_a_shared_record_has_the_labels_of_the_study_that_took_it(tmp_path, other):
    """Under the base rate of another file the same rate is another multiple of it."""
    arm = {"optim.name": "sgd_momentum", "schedule.base_lr": 0.2}
    wanted = study(tmp_path, axes={"batch_size": [64], "optimizer": {"momentum": arm}}, report={"series": "optimizer"})
    mine = runner(wanted, tmp_path)
    while len(mine.store.runs()) < 2:
        assert mine._next() is not None
    rates = {run["lr"]: (run["cell"], run["factor"]) for run in mine.store.runs().values()}
    labels = {"batch_size": "64", "optimizer": "momentum"}
    assert rates == {0.1: (labels, 0.5), 0.2: (labels, 1.0)}  # 0.05, 0.1 and 0.2 are there, 0.4 is not


def test_records_of_other_images_are_not_taken(tmp_path, other):
    mine = runner(study(tmp_path, axes=MINE, data="other images"), tmp_path)
    assert mine._next().cell.key == "64 | SGD"
    assert not mine.store.runs()


def test_what_other_studies_have_is_listed_as_done(tmp_path, other, capsys):
    study(tmp_path, axes=MINE)
    command.main([str(tmp_path / "tiny.yaml"), "--records", str(tmp_path / "records"), "--list"])
    assert "6 runs done, 3 to do" in capsys.readouterr().out
    assert not (tmp_path / "records/study-tiny.jsonl").exists()


def test_the_seconds_of_a_run_that_went_on_are_those_of_all_its_processes(tmp_path):
    mine = runner(study(tmp_path), tmp_path)
    run = mine._next()
    (mine.work / run.id).mkdir()
    _, first = mine._launch([sys.executable, "-c", "sum(range(10**7))"], run)
    code, both = mine._launch([sys.executable, "-c", "raise SystemExit(3)"], run)
    assert code == 3
    assert both > first > 0
