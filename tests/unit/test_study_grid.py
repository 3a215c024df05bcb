"""Which runs a study consists of, at every point of its life."""

import re
from pathlib import Path

import pytest
from study_tools import TINY, finish, record, study

from benchmarks import study_grid, study_store
from benchmarks.record import RECORDS
from dist_lars.errors import UserError

SHIPPED = sorted((Path(study_grid.__file__).parent / "studies").glob("*.yaml"))


def peak(run):
    """A hump over the learning rate, its top at factor 1."""
    return 80 - 10 * abs(run.factor - 1) + run.seed


def test_cells_are_all_combinations_in_order_of_the_file(tmp_path):
    found = study_grid.cells(study(tmp_path))
    assert [c.key for c in found] == ["64 | SGD", "64 | LARS", "256 | SGD", "256 | LARS"]
    assert found[3].options["batch_size"] == 256
    assert found[3].options["optim.name"] == "lars"
    assert study_grid.plan_of(found[2].options).rate.peak == pytest.approx(0.4)  # linear
    assert study_grid.plan_of(found[3].options).rate.peak == pytest.approx(8.0)  # square root, and "4e+0" is a number


def test_rules_reach_the_cells_that_they_name_and_no_others(tmp_path):
    where = [{"arm": "LARS", "batch_size": [256], "set": {"optim": {"weight_decay": 0.25}}}]
    decays = [c.options.get("optim.weight_decay") for c in study_grid.cells(study(tmp_path, where=where))]
    assert decays == [None, None, None, 0.25]


def test_a_sweep_trains_shorter_on_the_others_and_is_judged_on_those_held_out(tmp_path):
    wanted = study(tmp_path)
    runs = study_grid.runs(wanted, {})
    assert [(r.cell.key, r.stage, r.factor) for r in runs[:4]] == [
        ("64 | SGD", "select", 0.5), ("64 | SGD", "select", 1), ("64 | SGD", "select", 2), ("64 | LARS", "select", 0.5),
    ]  # fmt: skip
    assert len(runs) == 12  # no final one before its rate is chosen
    assert [r.plan().rate.peak for r in runs[:3]] == pytest.approx([0.05, 0.1, 0.2])
    plan = runs[0].plan()
    assert (plan.epochs, plan.train_images, plan.val_images) == (2, 1200, 300)
    assert plan.rate.warmup_steps == plan.steps_per_epoch / 2  # the same share of a shorter training


def test_sweeps_may_have_a_share_of_the_epochs_of_each_cell(tmp_path):
    axes = {"length": {"short": {"epochs": 4}, "long": {"epochs": 24}, "one": {"epochs": 1}}}
    select = {"share": 0.5, "factors": [1]}
    wanted = study(tmp_path, axes=axes, select=select, report={"series": "length"})
    assert [run.plan().epochs for run in study_grid.runs(wanted, {})] == [2, 12, 1]


def test_final_runs_follow_at_the_best_rate_with_all_seeds_on_all_images(tmp_path):
    wanted = study(tmp_path)
    records = finish(wanted, peak)
    finals = [r for r in study_grid.runs(wanted, records) if r.stage == "final"]
    assert [(r.cell.key, r.seed) for r in finals[:4]] == [
        ("64 | SGD", 1), ("64 | LARS", 1), ("256 | SGD", 1), ("256 | LARS", 1)
    ]  # fmt: skip
    assert sorted(r.seed for r in finals[4:]) == [2] * 4 + [3] * 4
    assert len(finals) == 12
    assert {r.factor for r in finals} == {1.0}
    plan = finals[0].plan()
    assert (plan.epochs, plan.train_images, plan.val_images) == (4, 1500, 297)
    # The validation images are looked at once, at the end.
    assert finals[0].options["log.eval_epochs"] > plan.epochs


def test_a_group_has_one_final_run_of_each_cell_before_the_next_begins_and_the_other_seeds_last(tmp_path):
    wanted = study(tmp_path)
    sweep = [r for r in study_grid.runs(wanted, {}) if r.cell.labels["batch_size"] == "64"]
    records = {r.id: record(r, peak(r)) for r in sweep}
    missing = [r for r in study_grid.runs(wanted, records) if r.id not in records]
    assert [r.stage for r in missing] == ["final"] * 2 + ["select"] * 6 + ["final"] * 4
    assert [r.seed for r in missing if r.stage == "final"] == [1, 1, 2, 3, 2, 3]


def test_one_half_done_sweep_of_a_group_keeps_all_of_its_finals_waiting(tmp_path):
    """An extension may still give every cell another rate."""
    wanted = study(tmp_path)
    sweep = [r for r in study_grid.runs(wanted, {}) if r.cell.labels["batch_size"] == "64"]
    records = {r.id: record(r, peak(r)) for r in sweep[:-1]}
    assert not [r for r in study_grid.runs(wanted, records) if r.stage == "final"]


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "best"),
    [((10, 30, 20), 1.0), ((30, 30, 20), 0.5), ((10, None, 20), 2.0), ((None, None, 5), 2.0), ((10, 20, None), 1.0)],
)
def test_the_best_rate_is_chosen_the_smaller_of_two_and_never_one_that_diverged(tmp_path, scores, best):
    wanted = study(tmp_path, select={**TINY["select"], "extend": 0})
    cell = study_grid.cells(wanted)[0]
    runs = study_grid.sweep(wanted, cell, [0.5, 1.0, 2.0])
    records = {r.id: record(r, s) for r, s in zip(runs, scores, strict=True)}
    assert study_grid.chosen(wanted, cell, [0.5, 1.0, 2.0], records) == best
    assert study_grid.chosen(wanted, cell, [0.5, 1.0, 2.0], dict(list(records.items())[:2])) is None


def test_a_best_rate_at_the_edge_gives_every_cell_of_the_group_one_more(tmp_path):
    """LARS at 64 gets better all the way up; SGD beside it is best in the middle, at 256 everything is."""
    wanted = study(tmp_path)

    def accuracy(run):
        return 50 + run.factor if run.cell.key == "64 | LARS" else peak(run)

    records = finish(wanted, accuracy)
    groups = [study_grid.sweeps(wanted, group, records) for group in study_grid.groups(wanted)]
    # Twice, as `extend` allows; SGD gets as many, about its own best.
    assert groups[0] == {"64 | SGD": [0.25, 0.5, 1, 2, 4], "64 | LARS": [0.5, 1, 2, 4, 8]}
    assert groups[1] == {"256 | SGD": [0.5, 1, 2], "256 | LARS": [0.5, 1, 2]}
    edges = {c.key: study_grid.at_edge(wanted, c, groups[i // 2][c.key], records)
             for i, c in enumerate(study_grid.cells(wanted))}  # fmt: skip
    assert edges == {"64 | SGD": False, "64 | LARS": True, "256 | SGD": False, "256 | LARS": False}
    finals = {r.cell.key: r.factor for r in study_grid.runs(wanted, records) if r.stage == "final"}
    assert finals == {"64 | SGD": 1, "64 | LARS": 8, "256 | SGD": 1, "256 | LARS": 1}


def test_a_sweep_extends_downward_where_its_best_is_the_smallest(tmp_path):
    wanted = study(tmp_path, select={**TINY["select"], "extend": 1})
    records = finish(wanted, lambda run: 50 - run.factor)
    factors = study_grid.sweeps(wanted, study_grid.groups(wanted)[0], records)
    assert factors["64 | SGD"] == [0.25, 0.5, 1, 2]


def test_without_a_sweep_every_cell_trains_at_its_own_rate(tmp_path):
    runs = study_grid.runs(study(tmp_path, select=None), {})
    assert len(runs) == 12
    assert {(r.stage, r.factor) for r in runs} == {("final", 1.0)}


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_run_is_known_by_what_it_computes_not_by_where(tmp_path):
    run = study_grid.runs(study(tmp_path), {})[0]
    same = {"data.path": "/elsewhere", "data.workers": 7, "log.every_steps": 3, "guard.hang_seconds": 9.0}
    assert study_grid.Run(run.cell, run.stage, run.factor, run.seed, run.options | same).id == run.id
    for change in ({"optim.lr": 0.06}, {"seed": 9}, {"epochs": 3}, {"batch_size": 96}, {"data.hold_out": 0.3}):
        assert study_grid.Run(run.cell, run.stage, run.factor, run.seed, run.options | change).id != run.id


def test_two_rules_that_arrive_at_one_rate_share_the_run(tmp_path):
    axes = {**TINY["axes"], "arm": {"linear": {"schedule.scaling": "linear"}, "sqrt": {"schedule.scaling": "sqrt"}}}
    runs = study_grid.runs(study(tmp_path, axes=axes, report={"series": "arm"}), {})
    # At 64, the base, the rules agree on all three rates; at 256 linear has 0.2, 0.4, 0.8 and sqrt 0.1, 0.2, 0.4.
    assert len(runs) == 12
    assert len({r.id for r in runs}) == 3 + 4


@pytest.mark.parametrize("name", sorted(p.stem.removeprefix("study-") for p in RECORDS.glob("study-*.jsonl")))
def test_recorded_runs_are_runs_of_their_study(name):
    """Whoever changes how options come about loses hours of records, unless ids stay."""
    records = study_store.Store(RECORDS, name).runs()
    wanted = study_grid.load(SHIPPED[0].parent / f"{name}.yaml")
    known = study_grid.runs(wanted, records)
    # A sweep that was extended later may have taken a cell to another rate: its first final runs stay on record.
    tried = {(run.cell.key, run.factor): run for run in known if run.stage == "select"}.values()
    first = [study_grid.final_run(wanted, run.cell, run.factor, s) for run in tried for s in wanted.final["seeds"]]
    assert set(records) <= {run.id for run in [*known, *first]}


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_left_open_is_what_the_trainer_has(tmp_path):
    open_ends = {"base": {k: v for k, v in TINY["base"].items() if k not in ("epochs", "model", "schedule")}}
    wanted = study(tmp_path, **open_ends, title=None, report={"series": "batch_size", "reference": 64}, where=None)
    (run, *_) = study_grid.runs(wanted, {})
    assert (run.options["model.name"], run.options["epochs"]) == ("resnet18", 2)
    assert wanted.reference("256") == "64"


def test_the_study_of_your_own_in_the_docs_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs/evidence.md").read_text()
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    wanted = study_grid.load(tmp_path / "mine.yaml", path_given=True, overrides={"data.path": "/data/mine"})
    assert [cell.key for cell in study_grid.cells(wanted)] == ["256 | SGD", "256 | LARS", "4096 | SGD", "4096 | LARS"]
    assert len(study_grid.runs(wanted, {})) == 4 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, "unknown key 'axis'"),
        ({"axes": {}}, "needs `axes`"),
        ({"select": {"epoch": 3}}, "select: unknown key 'epoch'"),
        ({"select": {"epochs": 3, "share": 0.5}}, "select: either `epochs`"),
        ({"where": [{"arm": "LRAS", "set": {}}]}, "where: arm: unknown key 'LRAS'; known: LARS, SGD"),
        ({"report": {"refer": "LARS"}}, "report: unknown key 'refer'"),
        ({"report": {"series": "arm", "against": {"SGD": "LRAS"}}}, "report: against: unknown key 'LRAS'"),
        ({"report": {"series": "arm", "against": {"SDG": "LARS"}}}, "report: against: unknown key 'SDG'"),
        ({"axes": {"batchsize": [1]}}, "did you mean batch_size"),
        ({"axes": {"arm": {"x": {"optim.named": "sgd"}}}}, "did you mean optim.name"),
        ({"axes": {"batch_size": [50]}, "report": {}}, "batch_size 50 does not divide"),
        ({"axes": {"batch_size": [3200]}, "report": {}}, "larger than the 1500 training images"),
        ({"report": {"series": "arm", "reference": "LRAS"}}, "report: reference: unknown key 'LRAS'"),
        ({"report": {"x": "batchsize"}}, "report: x and series are axes: unknown key 'batchsize'"),
        ({"name": "my study/1"}, "its name 'my study/1' becomes part of file names"),
        ({"data": ""}, "needs `data`"),
        ({"select": {"factors": 2}}, "select: factors is 2, but it must be a list"),
        ({"final": {"seeds": 3}}, "final: seeds is 3, but it must be a list"),
        ({"final": {"seeds": [1, 1]}}, r"final: seeds is \[1, 1\], but it must be whole numbers, each once"),
        ({"final": {"seeds": [1.5]}}, "must be whole numbers, each once"),
        ({"select": {"hold_out": 0}}, "hold_out is 0, but it must be a share"),
        ({"select": {"extend": "x"}}, "select: extend is 'x', but it must be a whole number"),
        ({"axes": {"batch_size": 256}, "report": {}}, "axes: batch_size is 256, but it must be labels"),
        ({"axes": {"arm": {"SGD": 3}}, "report": {}}, "but it must be labels with their options"),
        ({"axes": ["a"]}, r"study: axes is \['a'\], but it must be keys with values"),
        ({"where": [{"arm": "LARS"}]}, "needs `set`"),
        ({"report": {"series": "arm", "against": {"SGD": "LARS"}}}, "the others need `reference`"),
        ({"base": {"epochs": "many"}}, "epochs is 'many', but it must be a whole number"),
    ],
)
def test_a_study_with_a_mistake_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        study(tmp_path, **changes)


def test_own_images_bring_their_own_options_and_records(tmp_path):
    base = {"data.kind": "folder", "model.name": "resnet18", "epochs": 18}
    study(tmp_path, on_path={"base": base, "select": {"epochs": 9}})
    own = study_grid.load(tmp_path / "tiny.yaml", True, {"data.path": "/data/imagenet"})
    assert own.name == "tiny-own"
    assert study_grid.cells(own)[0].options["model.name"] == "resnet18"
    assert study_grid.runs(own, {})[0].plan().epochs == 9
    assert study_grid.load(tmp_path / "tiny.yaml").name == "tiny"


def test_an_option_that_cells_differ_in_is_refused_on_the_command_line(tmp_path):
    """The cell's own would win, without a word."""
    study(tmp_path)
    with pytest.raises(UserError, match="--optim.name is what cells of the study differ in"):
        study_grid.load(tmp_path / "tiny.yaml", overrides={"optim.name": "lars"})


@pytest.mark.parametrize("key", ["seed", "optim.lr", "data.hold_out", "log.trust_steps"])
def test_an_option_that_the_study_sets_itself_is_refused_on_the_command_line(tmp_path, key):
    study(tmp_path)
    with pytest.raises(UserError, match=f"--{key} is what a study sets for each run"):
        study_grid.load(tmp_path / "tiny.yaml", overrides={key: 1})
    study(tmp_path, select=None)
    if key == "data.hold_out":  # without sweeps it is the user's
        assert study_grid.load(tmp_path / "tiny.yaml", overrides={key: 0.5}).base[key] == 0.5


def test_a_study_made_shorter_has_shorter_sweeps(tmp_path):
    study(tmp_path)
    short = study_grid.load(tmp_path / "tiny.yaml", overrides={"epochs": 1})
    assert {run.plan().epochs for run in study_grid.runs(short, {})} == {1}


@pytest.mark.parametrize("own", [False, True], ids=["as shipped", "on images of the user's own"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_studies_plan_their_runs(path, own):
    wanted = study_grid.load(path, own)
    runs = study_grid.runs(wanted, {})
    assert runs
    for run in runs:
        assert run.plan().total_steps > 0
    if wanted.report.get("reference"):
        assert wanted.report["reference"] in wanted.axes[wanted.series]
    if wanted.report.get("x"):
        assert wanted.report["x"] in wanted.axes
    arms = {len(study_grid.sweep(wanted, cell, [1.0])) for cell in study_grid.cells(wanted)}
    assert len(arms) == 1  # one budget for all
