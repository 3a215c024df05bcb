"""The records of a study and what is made of them: statistics, tables, plots, storage."""

import json
import threading

import pytest
from study_tools import TINY, finish, record, study

from benchmarks import study_grid, study_report, study_store
from benchmarks.record import RECORDS
from dist_lars.data.folder import index_folder
from dist_lars.errors import UserError
from tests.conftest import paint


def accuracy(run):
    """LARS wins by 5 points; SGD diverges at 256 with seed 3."""
    if run.stage == "select":
        return 80 - 10 * abs(run.factor - 1)
    lars = run.cell.labels["arm"] == "LARS"
    if run.seed == 3 and run.cell.key == "256 | SGD":
        return None
    return 70 + 5 * lars + run.seed / 10


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(study, store, its report), to be read only."""
    folder = tmp_path_factory.mktemp("told")
    wanted = study(folder)
    store = study_store.Store(folder / "records", wanted.name)
    machine = {"machine": {"cpu": "abacus", "cores": 2}, "versions": {"torch": "9"}, "precision": "fp32",
               "git": {"commit": "0123456789abcdef", "dirty": False}}  # fmt: skip
    for line in finish(wanted, accuracy).values():
        line = {k: v for k, v in line.items() if k != "kind"}
        store.add(line, machine, study_report.header(wanted))
    return wanted, store, study_report.write(wanted, store)


def test_welch_is_that_of_the_textbook():
    """Welch 1947's statistic by hand for (1, 2, 3, 4) and (2, 4, 6, 8, 10): t = -2.2514, 5.52 degrees of freedom."""
    found = study_report.welch([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0, 10.0])
    assert found.difference == pytest.approx(-3.5)
    assert found.p == pytest.approx(0.0690, abs=5e-4)
    assert (found.low + found.high) / 2 == pytest.approx(-3.5)
    assert found.low < found.difference < found.high
    assert study_report.contrast([[1.0, 2.0, 3.0, 4.0]], [[2.0, 4.0, 6.0, 8.0, 10.0]]) == pytest.approx(found)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([], []), ([1.0, 1.0], [2.0, 2.0])])
def test_no_test_without_a_spread(a, b):
    assert study_report.welch(a, b) is None


def test_holm_corrects_for_the_number_of_tests():
    assert study_report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert study_report.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert study_report.holm([]) == []


def test_mean_and_spread():
    assert study_report.mean_and_spread([70.0, 71.0, 72.0]) == "71.00 ± 1.00 (3)"
    assert study_report.mean_and_spread([70.0]) == "70.00 (1)"
    assert study_report.mean_and_spread([]) == ""


def test_the_main_table_has_the_steps_per_epoch_beside_every_batch(told):
    _, _, text = told
    assert "| batch_size | steps per epoch | SGD | LARS |" in text
    assert "| 64 | 23 | 70.20 ± 0.10 (3) | 75.20 ± 0.10 (3) |" in text


def test_a_run_that_diverged_counts_as_guessing_and_is_told(told):
    _, _, text = told
    assert "| 256 | 5 | 50.10 ± 34.73 (3) | 75.20 ± 0.10 (3) |" in text  # (70.1 + 70.2 + 10) / 3
    row = next(line for line in text.splitlines() if line.startswith("| 256 | SGD") and "99.00" in line)
    assert "99.00 ± 0.00 (2)" in row
    assert row.split("|")[9].strip() == "1"


def test_differences_are_of_the_reference_with_their_interval(told):
    _, _, text = told
    line = next(line for line in text.splitlines() if "LARS - SGD" in line and line.startswith("| 64"))
    assert "5.0" in line
    assert "4.77 to 5.23" in line


def test_the_state_is_honest(told, tmp_path):
    wanted, store, text = told
    assert "Complete: 4 of 4 cells" in text
    lines = store.path.read_text().splitlines()
    (tmp_path / "part").mkdir()
    part = study_store.Store(tmp_path / "part", wanted.name)
    part.path.write_text("\n".join(lines[:-5]) + "\n")
    text = study_report.write(wanted, part)
    assert "In progress: 1 of 4 cells have all their seeds; 19 of 24 runs" in text


def test_a_rate_at_the_edge_is_warned_of(tmp_path):
    wanted = study(tmp_path, select={**TINY["select"], "extend": 0})
    results = study_report.Results(wanted, finish(wanted, lambda run: 50 + run.factor))
    text = study_report._rates(results)
    assert "**at the edge**: 64 | LARS: the best rate, 8, is the last one tried" in text
    inside = study_report.Results(wanted, finish(wanted, accuracy))
    assert "at the edge" not in study_report._rates(inside)


def test_an_edge_that_lies_inside_the_sweep_of_another_arm_is_told_so(tmp_path):
    """At 256 the linear rule's 0.2, 0.4, 0.8 begin inside the 0.1, 0.2, 0.4 of the square-root rule."""
    rules = {"linear": {"schedule.scaling": "linear"}, "sqrt": {"schedule.scaling": "sqrt"}}
    wanted = study(
        tmp_path,
        axes={"batch_size": [256], "arm": rules},
        report={"series": "arm"},
        select={**TINY["select"], "extend": 0},
    )
    found = finish(wanted, lambda run: 50 - 100 * abs(run.options["optim.lr"] - 0.2))
    text = study_report._rates(study_report.Results(wanted, found))
    assert "256 | linear: the best rate, 0.2, is the last one tried; sqrt has it inside its sweep" in text
    assert text.count("at the edge") == 1


@pytest.mark.parametrize(("best", "told"), [(12.9, True), (13.0, False)])
def test_a_sweep_that_learned_nothing_has_chosen_nothing(tmp_path, best, told):
    wanted = study(tmp_path, select={**TINY["select"], "extend": 0})
    found = finish(
        wanted, lambda run: (best if run.cell.key == "64 | SGD" else 40.0) - abs(run.factor - 1) + run.seed / 10
    )
    text = study_report._rates(study_report.Results(wanted, found))
    assert text.count("nothing learned") == told
    assert ("64 | SGD: guessing gives 10" in text) == told
    text = study_report.tables(study_report.Results(wanted, found))
    assert ("| LARS - SGD, no rate trained |" in text) == told  # its row at 64
    assert ("| 256 | SGD, no rate trained |" in text) == told  # what it gains from there
    assert text.count("no rate trained") == 3 * told  # and its cell of the first table


def test_a_sweep_that_is_not_over_is_not_judged(tmp_path):
    wanted = study(tmp_path)
    first = study_grid.runs(wanted, {})[0]
    text = study_report.tables(study_report.Results(wanted, {first.id: record(first, 10.0)}))
    assert "no rate trained" not in text


def test_a_difference_without_spread_has_a_row_and_no_part_in_the_correction(tmp_path):
    arms = {name: {"optim.name": name} for name in ("lars", "sgd", "nesterov")}
    report = {"series": "arm", "reference": "lars"}
    wanted = study(tmp_path, axes={"batch_size": [64], "arm": arms}, report=report)
    base = {"lars": 70.0, "sgd": 72.0, "nesterov": 71.0}

    def accuracy(run):
        arm = run.cell.labels["arm"]
        return base[arm] + run.seed * (arm == "nesterov")

    rows = study_report._comparisons(study_report.Results(wanted, finish(wanted, accuracy))).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert cells[0][3:-1] == ["lars - sgd", "-2.00", "no spread, no test", "", ""]
    assert cells[1][3] == "lars - nesterov"
    assert cells[1][6] == cells[1][7] != ""  # one test in the family


def test_a_shared_run_counts_for_both_cells(tmp_path):
    rules = {"linear": {"schedule.scaling": "linear"}, "sqrt": {"schedule.scaling": "sqrt"}}
    axes = {"batch_size": [64], "arm": rules}  # the base batch, where the rules agree
    wanted = study(tmp_path, axes=axes, report={"x": "batch_size", "series": "arm"})
    results = study_report.Results(wanted, finish(wanted, lambda run: 60 - abs(run.factor - 1) + run.seed))
    assert [results.top1(cell) for cell in results.cells] == [[61, 62, 63]] * 2
    assert len(results.records) == 3 + 3


def test_arms_that_share_their_runs_are_one_comparison(tmp_path):
    """Two names for the same numbers shall not make Holm's correction stricter."""
    sgd = {"optim.name": "sgd_momentum"}
    rules = {"linear": {**sgd, "schedule.scaling": "linear"}, "sqrt": {**sgd, "schedule.scaling": "sqrt"}}
    axes = {"batch_size": [64], "arm": {**rules, "LARS": {"optim.name": "lars"}}}
    wanted = study(tmp_path, axes=axes)
    found = finish(wanted, lambda run: 60 + 5 * (run.cell.labels["arm"] == "LARS") + run.seed)
    rows = study_report._comparisons(study_report.Results(wanted, found)).splitlines()[2:]
    assert len(rows) == 1
    assert "LARS - linear = sqrt" in rows[0]
    p, corrected = (cell.strip() for cell in rows[0].split("|")[-3:-1])
    assert p == corrected


def test_the_reference_is_not_compared_with_itself_under_another_name(tmp_path):
    lars = {"optim.name": "lars", "schedule.scaling": "linear"}
    axes = {"batch_size": [64], "arm": {"LARS": lars, "LARS again": dict(lars), "SGD": {"optim.name": "sgd_momentum"}}}
    wanted = study(tmp_path, axes=axes)
    found = finish(wanted, lambda run: 60 + 5 * (run.cell.labels["arm"] != "SGD") + run.seed)
    text = study_report._comparisons(study_report.Results(wanted, found))
    assert "LARS - SGD" in text
    assert "LARS again" not in text


def test_an_arm_may_have_a_reference_of_its_own(tmp_path):
    arms = {name: {"optim.name": name} for name in ("lars", "sgd", "nesterov")}
    report = {"series": "arm", "reference": "lars", "against": {"nesterov": "sgd"}}
    wanted = study(tmp_path, axes={"batch_size": [64], "arm": arms}, report=report)
    found = finish(wanted, lambda run: 60 + 5 * list(arms).index(run.cell.labels["arm"]) + run.seed)
    rows = study_report._comparisons(study_report.Results(wanted, found)).splitlines()[2:]
    assert [row.split("|")[3].strip() for row in rows] == ["lars - sgd", "sgd - nesterov"]
    assert [float(row.split("|")[4]) for row in rows] == [-5, -5]


def test_losses_against_the_smallest_batch(tmp_path):
    wanted = study(tmp_path)
    found = finish(wanted, lambda run: 70.0 - 20 * (run.cell.key == "256 | SGD") + run.seed)
    rows = study_report._losses(study_report.Results(wanted, found)).splitlines()
    assert rows[0] == (
        "| batch_size | arm | steps per epoch | against | points | 95 % interval "
        "| points that the reference loses less | 95 % interval that the reference loses less | p | p, Holm |"
    )
    cells = [[cell.strip() for cell in row.split("|")] for row in rows[2:]]
    assert [(row[1], row[2], row[4], round(float(row[5]))) for row in cells] == [
        ("256", "SGD", "64", -20), ("256", "LARS", "64", 0),
    ]  # fmt: skip
    # Four variances of 1 over 3: the error is sqrt(4 / 3), 8 degrees of freedom, t = 2.30600.
    assert [row[7:9] for row in cells] == [["20.00", "17.34 to 22.66"], ["", ""]]


def test_losses_are_corrected_for_the_number_of_their_tests(tmp_path):
    """Two arms of one optimizer and rate share their runs, and are one test of the two."""
    arm = TINY["axes"]["arm"]
    axes = {**TINY["axes"], "arm": {**arm, "SGD too": arm["SGD"], "Nesterov": {"optim.name": "nesterov"}}}
    wanted = study(tmp_path, axes=axes)
    found = finish(wanted, lambda run: 70.0 - 3 * (run.options["batch_size"] == 256) * (
        run.options["optim.name"] != "lars") + run.seed * (1 + (run.options["optim.name"] == "nesterov")))  # fmt: skip
    rows = study_report._losses(study_report.Results(wanted, found)).splitlines()[2:]
    told = {cells[2].strip(): cells[9:11] for cells in (row.split("|") for row in rows)}
    p = {name: tuple(float(cell) for cell in told[name]) for name in ("SGD", "SGD too", "Nesterov")}
    assert p["SGD"] == p["SGD too"]
    assert p["SGD"][0] < p["Nesterov"][0]
    assert p["SGD"][1] == pytest.approx(2 * p["SGD"][0], rel=0.02)
    assert p["Nesterov"][1] == p["Nesterov"][0]


def test_a_contrast_of_four_means_is_welch_and_satterthwaite():
    """By hand: 75 - 71 - (80 - 70) = -6; variances over n 1/3, 4/3, 1/3, 16/3: 22/3 with 484/137 degrees of freedom.

    t(3.5328) at 97.5 % is 2.937, by linear interpolation of 1/df between 3.182 (3) and 2.776 (4).
    """
    found = study_report.contrast(
        [[74.0, 75.0, 76.0], [68.0, 70.0, 72.0]], [[70.0, 71.0, 72.0], [76.0, 80.0, 84.0]]
    )  # fmt: skip
    assert found.difference == pytest.approx(-6)
    assert found.high - found.difference == pytest.approx(2.937 * (22 / 3) ** 0.5, rel=0.005)
    assert found.low + found.high == pytest.approx(-12)


def test_plots_are_drawn(told):
    _, store, text = told
    for name in ("accuracy", "curves", "rates", "trust"):
        assert (store.folder / f"study-tiny-{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"study-tiny-{name}.png" in text


def test_what_is_to_do_is_counted_with_its_cost(tmp_path):
    wanted = study(tmp_path)
    text = study_report.to_do(wanted, {})
    assert "0 runs done, 12 to do, 12 more when the rates are chosen" in text
    # sweeps: 12 runs of 2 epochs of 18 x 64 or 4 x 256; finals: 12 runs of 4 epochs of 23 x 64 or 5 x 256
    assert f"cnn_small: {(6 * 2 * (18 * 64 + 4 * 256) + 6 * 4 * (23 * 64 + 5 * 256)) / 1e6:.1f} million images" in text
    done = finish(wanted, accuracy)
    assert study_report.to_do(wanted, done) == f"{len(done)} runs done, 0 to do: complete"
    assert ", about 0.1 hours of one core" in study_report.to_do(wanted, {}, done)  # at the speed of others' records
    assert "hours" not in text


def test_runs_beside_the_study_are_told(tmp_path):
    wanted = study(tmp_path)
    done = finish(wanted, accuracy)
    assert "Not counted" not in study_report.tables(study_report.Results(wanted, done))
    text = study_report.tables(study_report.Results(wanted, done | {"other": next(iter(done.values()))}))
    assert "Not counted: 1 run at rates that are not the best any more, or with other options." in text


# --- the file ---------------------------------------------------------------------------------------------------------

MACHINE = {"machine": {"cpu": "x"}}


def test_a_line_is_stored_once_and_machines_once(tmp_path):
    store = study_store.Store(tmp_path, "x")
    for name in ("a", "b", "a"):
        store.add({"id": name, "stage": "final", "images": [2, 1]}, MACHINE, {"name": "x"})
    assert [line["kind"] for line in store.lines()] == ["study", "machine", "run", "run"]
    assert list(store.runs()) == ["a", "b"]
    assert {run["on"] for run in store.runs().values()} == {store.lines()[1]["id"]}
    assert {p.name for p in tmp_path.iterdir()} == {"study-x.jsonl", ".study-x.lock"}  # nothing of the writing is left


def test_many_writers_lose_nothing(tmp_path):
    def write(worker: int) -> None:
        store = study_store.Store(tmp_path, "x")
        for i in range(20):
            store.add({"id": f"{worker}-{i}", "stage": "final", "images": [2, 1]}, MACHINE, {"name": "x"})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(study_store.Store(tmp_path, "x").runs()) == 80


def test_another_precision_is_refused(tmp_path):
    """The option may be `auto` for both, and their ids alike."""
    wanted = study(tmp_path)
    store = study_store.Store(tmp_path, "tiny")
    first, second = (record(run, 50.0) for run in study_grid.runs(wanted, {})[:2])
    store.add(first, {"precision": "fp32"}, study_report.header(wanted))
    with pytest.raises(UserError, match="holds runs in fp32, and here they compute in bfloat16.*--records DIR"):
        store.add(second, {"precision": "bfloat16"}, study_report.header(wanted))
    assert len(store.runs()) == 1


def test_other_images_are_refused(tmp_path):
    store = study_store.Store(tmp_path, "x")
    store.add({"id": "a", "stage": "final", "images": [50_000, 10_000]}, MACHINE, {})
    store.add({"id": "b", "stage": "select", "images": [45_000, 5_000]}, MACHINE, {})
    with pytest.raises(UserError, match="other images belong into other records"):
        store.add({"id": "c", "stage": "final", "images": [1_281_167, 50_000]}, MACHINE, {})
    assert list(store.runs()) == ["a", "b"]


def test_as_many_images_of_other_names_are_refused(tmp_path):
    store = study_store.Store(tmp_path, "x")
    run = {"id": "a", "stage": "final", "images": [64, 12]}
    store.add(run, MACHINE, {"name": "x", "files": "jpeg"})
    with pytest.raises(UserError, match="image files of other names"):
        store.add(run | {"id": "b"}, MACHINE, {"name": "x", "files": "png"})
    store.add(run | {"id": "c"}, MACHINE, {"name": "x", "files": "jpeg", "select": None})
    assert list(store.runs()) == ["a", "c"]
    assert store.lines()[0] == {"kind": "study", "name": "x", "files": "jpeg", "select": None}  # what was asked last


def test_files_are_known_by_their_names_packed_or_not(tmp_path):
    import shutil

    from dist_lars.config import from_flat
    from dist_lars.data.packing import Options, pack

    def files(folder):
        counts = {"data.train_images": 6, "data.val_images": 3}
        return study_store.names_of_files(from_flat({"data.kind": "folder", "data.path": str(folder), **counts}))

    folder = paint(tmp_path / "jpeg", 6, 3)
    for split in ("train", "val"):
        options = Options(size=16, quality=90, shard_mb=1)
        pack(index_folder(str(folder / split)), str(tmp_path / "packed" / split), options, 1, lambda n: None)
    shutil.copytree(folder, tmp_path / "png")
    for path in (tmp_path / "png").rglob("*.jpg"):
        path.rename(path.with_suffix(".png"))
    assert files(folder) == files(tmp_path / "packed")
    assert files(folder) != files(tmp_path / "png")
    assert study_store.names_of_files(from_flat({"data.kind": "digits"})) is None
    with pytest.raises(UserError, match=r"has 6 \+ 3 images in 3 classes, but the study has 1,281,167 \+ 50,000"):
        study_store.names_of_files(from_flat({"data.kind": "folder", "data.path": str(folder)}))


def test_a_run_that_was_killed_and_went_on_tells_each_epoch_once(tmp_path):
    """After a kill between log line and checkpoint, the epoch is done and told again."""
    wanted = study(tmp_path)
    run = study_grid.runs(wanted, {})[0]
    plan = run.plan().as_dict()
    facts = [
        {"kind": "start", "plan": plan, "classes": 10},
        {"kind": "train", "step": 18, "loss": 2.0, "top1": 20.0, "count": 1152, "images_per_s": 100.0},
        {"kind": "start", "plan": plan, "classes": 10},
        {"kind": "train", "step": 18, "loss": 1.9, "top1": 21.0, "count": 1152, "images_per_s": 100.0},
        {"kind": "eval", "step": 18, "top1": 30.0},
        {"kind": "train", "step": 36, "loss": 1.5, "top1": 40.0, "count": 1152, "images_per_s": 50.0},
        {"kind": "eval", "step": 36, "top1": 50.0},
        {"kind": "end", "top1": 50.0, "top5": 90.0, "loss": 1.4},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in facts))
    line = study_store.summary(run, tmp_path, 40.0)
    assert (line["train_top1"], line["held_out_top1"]) == ([21.0, 40.0], [30.0, 50.0])
    assert line["seconds"] == pytest.approx(11.52 + 23.04, abs=0.06)
    assert (line["state"], line["top1"], line["classes"]) == ("finished", 50.0, 10)
    assert line["options"]["optim.lr"] == run.options["optim.lr"]


@pytest.mark.parametrize("path", sorted(RECORDS.glob("study-*.jsonl")), ids=lambda p: p.stem)
def test_stored_reports_are_those_of_the_stored_records(path):
    store = study_store.Store(RECORDS, path.stem.removeprefix("study-"))
    wanted = study_grid.load(RECORDS.parent / f"studies/{path.stem.removeprefix('study-')}.yaml")
    stored, _, _ = path.with_suffix(".md").read_text().partition("\n\n## Plots")
    assert stored == study_report.tables(study_report.Results(wanted, store.runs()))


def test_stored_studies_are_complete():
    for path in sorted(RECORDS.glob("study-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["kind"] for line in lines].count("study") == 1, path.name
        machines = {line["id"]: line for line in lines if line["kind"] == "machine"}
        assert all({"git", "versions", "machine"} <= set(m) for m in machines.values()), path.name
        for run in (line for line in lines if line["kind"] == "run"):
            assert {"id", "cell", "stage", "lr", "seed", "state", "top1", "options", "date"} <= set(run), path.name
            assert run["on"] in machines, path.name


def test_a_record_says_what_its_options_hash_to(tmp_path):
    """A record's options are all that is needed to compute its run again."""
    wanted = study(tmp_path)
    run = study_grid.runs(wanted, {})[0]
    kept = {k: v for k, v in run.options.items() if not k.startswith(study_store.MAY_DIFFER_ON_RESUME)}
    assert study_grid.Run(run.cell, run.stage, run.factor, run.seed, kept).id == run.id
    assert record(run, 1.0)["id"] == run.id
