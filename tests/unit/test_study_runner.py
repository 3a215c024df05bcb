"""What a study takes up next, without training anything."""

import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from study_tools import TINY, finish, study

from benchmarks import study as command
from benchmarks import study_grid, study_report, study_store
from dist_lars.errors import UserError


def runner(wanted, folder, *words):
    args, _ = command.parse(
        [str(folder / "tiny.yaml"), "--records", str(folder / "records"), "--work", str(folder / "work"), *words]
    )
    return command.Runner(wanted, study_store.Store(args.records, wanted.name), args)


def put(store, line, wanted):
    """Record a made-up run."""
    content = {k: v for k, v in line.items() if k != "kind"}
    store.add(content, {"machine": {"cpu": "abacus"}}, study_report.header(wanted))


@pytest.fixture
def other(tmp_path):
    """A study with records, of whose cells one is asked by another study under another name."""
    wanted = study(tmp_path, name="other")
    store = study_store.Store(tmp_path / "records", "other")
    for line in finish(wanted, lambda run: 80 - 10 * abs(run.factor - 1)).values():
        put(store, line, wanted)
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


def test_records_of_other_files_are_not_taken(tmp_path, other, monkeypatch):
    """JPEG copies of a folder of PNGs are other images, under whatever name."""
    lines = other.path.read_text().splitlines()
    other.path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"files": "jpeg"}), *lines[1:]]) + "\n")
    for files, taken in (("png", 0), ("jpeg", 6)):
        monkeypatch.setattr(study_store, "names_of_files", lambda config, files=files: files)
        mine = runner(study(tmp_path, axes=MINE), tmp_path)
        assert mine._next()
        assert len(mine.store.runs()) == taken
        for held in mine.mine.values():
            held.close()
    with pytest.raises(UserError, match="image files of other names"):
        monkeypatch.setattr(study_store, "names_of_files", lambda config: "png")
        runner(study(tmp_path, axes=MINE), tmp_path)


def test_what_there_is_to_do_is_told_before_there_are_images(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DIST_LARS_DATA", raising=False)
    data = TINY["base"]["data"] | {"kind": "folder"}
    study(tmp_path, base=TINY["base"] | {"data": data})
    words = [str(tmp_path / "tiny.yaml"), "--records", str(tmp_path / "records"), "--list"]
    command.main(words)
    assert "0 runs done" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # images that are named are looked at
        command.main([*words, "--data.path", str(tmp_path / "none")])
    assert "none does not exist" in capsys.readouterr().err


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    study(tmp_path)
    words = [str(tmp_path / "tiny.yaml"), "--records", str(tmp_path / "none"), "--report"]
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 0
    assert "no run is recorded in" in capsys.readouterr().out


def test_runs_with_other_options_are_no_report(tmp_path, capsys):
    """The report of the runs that there are is not written over by one of none."""
    short = study(tmp_path, base=TINY["base"] | {"epochs": 3})
    store = study_store.Store(tmp_path / "records", "tiny")
    line = next(iter(finish(short, lambda run: 80).values()))
    line["options"] = study_grid.runs(short, {})[0].options
    put(store, line, short)
    study(tmp_path, select={"hold_out": 0.2, "epochs": 4})
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path / "tiny.yaml"), "--records", str(tmp_path / "records"), "--report"])
    assert ended.value.code == 2
    assert "but none with these options (epochs: 2 -> 4" in capsys.readouterr().err
    assert not list((tmp_path / "records").glob("*.md"))
    with pytest.raises(UserError, match="none with these options"):  # nor are they trained beside those
        runner(study_grid.load(tmp_path / "tiny.yaml"), tmp_path)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "--workers is 0, but it must be at least 1"),
        (["--max_runs", "-1"], "--max_runs is -1, but it must be at least 1"),
        (["--task", "2", "--of", "2"], "--task 2 --of 2: tasks of N are 0 to N - 1"),
        (["--worker", "2"], "unknown option --worker; did you mean --workers?"),
        (["--epoch", "2"], "did you mean epochs"),
        (["--data.path"], "--data.path: options of the trainer are written --key value"),
    ],
)
def test_a_wrong_option_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(["tiny.yaml", *words])
    assert message in capsys.readouterr().err


def test_values_are_no_options(tmp_path):
    assert command.parse(["tiny.yaml", "--data.path", "records"])[1] == {"data.path": "records"}


def test_a_misspelt_file_is_found(tmp_path):
    study(tmp_path)
    with pytest.raises(UserError, match=r"study .*tinny.yaml: No such file or directory; did you mean .*/tiny.yaml\?"):
        study_grid.load(tmp_path / "tinny.yaml")
    with pytest.raises(UserError, match=r"did you mean .*benchmarks/studies/digits.yaml\?"):
        study_grid.load(tmp_path / "digits")
    with pytest.raises(UserError, match="Is a directory$"):
        study_grid.load(tmp_path)


@pytest.mark.parametrize("option", ["--records", "--work"])
def test_folders_that_cannot_be_written_are_refused_before_any_run(tmp_path, option):
    wanted = study(tmp_path)
    with pytest.raises(UserError, match=f"{option} .*tiny.yaml/x cannot be written: Not a directory"):
        runner(wanted, tmp_path, option, str(tmp_path / "tiny.yaml/x"))


def test_options_of_the_command_are_in_the_report(tmp_path):
    study(tmp_path)
    wanted = study_grid.load(tmp_path / "tiny.yaml", overrides={"epochs": "1", "schedule.warmup_epochs": "0"})
    text = study_report.tables(study_report.Results(wanted, {}))
    assert "Options of the command: epochs 1, schedule.warmup_epochs 0.0." in text
    assert "with 1 seed and 1 epoch;" in text


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


def test_a_launcher_that_ends_with_0_has_not_finished_a_run(tmp_path, monkeypatch):
    """As one that loses a host may: the run keeps its checkpoints, and is no result."""
    mine = runner(study(tmp_path), tmp_path)
    run = mine._next()

    def launch(words, run):
        (mine.work / run.id / "status.json").write_text(json.dumps({"state": "running", "step": 3}))
        (mine.work / f"{run.id}.log").write_text("a host is gone")
        return 0, 1.0

    monkeypatch.setattr(mine, "_launch", launch)
    mine._train(run)
    assert re.match(r"64 \| SGD, select, 0\.5 x, seed 0: exit code 0: .*a host is gone", mine.failed[run.id], re.S)
    assert not mine.store.runs()
    assert (mine.work / run.id).is_dir()
    assert not mine.mine


def test_a_stop_that_comes_between_two_runs_starts_none(tmp_path, monkeypatch):
    mine = runner(study(tmp_path), tmp_path)
    run = mine._next()
    mine._ask_to_stop("SIGTERM")
    monkeypatch.setattr(mine, "_launch", lambda words, run: pytest.fail("started"))
    mine._train(run)
    assert not mine.failed
    assert not mine.mine
    assert mine._next() is None


def test_a_stop_that_comes_while_a_run_is_started_reaches_it(tmp_path, monkeypatch):
    mine = runner(study(tmp_path), tmp_path)
    run = mine._next()
    (mine.work / run.id).mkdir()
    real = subprocess.Popen

    def start(*words, **options):
        mine.stop = "SIGTERM"  # the signal's handler has run before there was a process
        return real(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    wait = f"import os, time\nwhile not os.path.exists({str(mine.work / run.id / 'STOP')!r}): time.sleep(0.01)"
    code, _ = mine._launch([sys.executable, "-c", wait], run)
    assert code == 0


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, monkeypatch):
    """Which may be where no stop is noticed, in a cache that is being filled say; it is no failure."""
    mine = runner(study(tmp_path), tmp_path)
    run = mine._next()
    (mine.work / run.id).mkdir()
    real = mine._launch
    sleep = [sys.executable, "-c", "import time\ntime.sleep(60)"]
    monkeypatch.setattr(mine, "_launch", lambda words, run: real(sleep, run))
    thread = threading.Thread(target=mine._train, args=(run,))
    thread.start()
    while run.id not in mine.processes:
        time.sleep(0.01)
    mine._hear(signal.SIGINT, None)
    assert (mine.work / run.id / "STOP").exists()
    thread.join(0.2)
    assert thread.is_alive()
    mine._hear(signal.SIGINT, None)
    thread.join(20)
    assert not thread.is_alive()
    assert not mine.failed
    assert mine.last_words() == ["stopped (SIGINT); the same command goes on from here"]


def test_a_terminal_that_is_gone_stops_the_runs(tmp_path, monkeypatch):
    mine = runner(study(tmp_path), tmp_path)
    run = mine._next()
    (mine.work / run.id).mkdir()

    def write(number, text):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.write", write)
    mine._hear(signal.SIGHUP, None)
    assert mine.stop == "SIGHUP"
    assert (mine.work / run.id / "STOP").exists()


def test_what_the_caller_ignores_stays_ignored(tmp_path, monkeypatch):
    """nohup wants no SIGHUP; and handlers are given back."""
    mine = runner(study(tmp_path), tmp_path)
    given = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_IGN}
    seen = {}
    monkeypatch.setattr(mine, "_next", lambda: seen.update({n: signal.getsignal(n) for n in given}))
    ours = {n: signal.signal(n, handler) for n, handler in given.items()}
    try:
        assert mine.go() == 0
        after = {n: signal.getsignal(n) for n in given}
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    assert seen == {signal.SIGTERM: mine._hear, signal.SIGINT: mine._hear, signal.SIGHUP: signal.SIG_IGN}
    assert after == given


@pytest.mark.parametrize(
    ("limit", "last"), [(2, ["stopped after --max_runs 2; the same command goes on from here"]), (99, [])]
)
def test_a_limit_of_runs_is_told_only_where_something_is_left(tmp_path, monkeypatch, limit, last):
    wanted = study(tmp_path, axes={"batch_size": [64], "arm": TINY["axes"]["arm"]})
    mine = runner(wanted, tmp_path, "--max_runs", str(limit))
    done = finish(wanted, lambda run: 80 - 10 * abs(run.factor - 1))

    def train(run):
        put(mine.store, done[run.id], wanted)
        mine._release(run)

    monkeypatch.setattr(mine, "_train", train)
    assert mine.go() == 0
    assert mine.last_words() == last
    assert mine.started == min(limit, len(done))


def test_a_task_ends_when_others_train_all_that_is_left(tmp_path):
    """Not so while a rate is still to be chosen, for that opens up new runs."""
    wanted = study(tmp_path, axes={"batch_size": [64], "arm": TINY["axes"]["arm"]})
    mine = runner(wanted, tmp_path)
    done = finish(wanted, lambda run: 80 - 10 * abs(run.factor - 1))
    last = [run for run in done.values() if run["stage"] == "final"][-2:]
    for line in done.values():
        if line not in last:
            put(mine.store, line, wanted)
    taken = [mine._next() for _ in last]
    assert {run.id for run in taken} == {line["id"] for line in last}
    assert runner(wanted, tmp_path)._next() is None
