"""Which runs a study consists of: STUDY.yaml and the records so far -> runs.

A study is a grid of cells, one for each combination of its axes. Where the learning rate is chosen (`select`), a cell
first trains at several multiples of its own rate, on a part of the training images, and is judged on the part held out.
Only the best of these is trained on all of them, with several seeds, and meets the validation images, once (`final`).

Everything here is a pure function of the file and the records: a study that was interrupted, or is shared by many
processes, needs no other memory.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_lars.cli import preset_text, typed_options
from dist_lars.config import LEAVES, Config, as_flat, flat_yaml, from_flat, plain
from dist_lars.continuation import MAY_DIFFER_ON_RESUME
from dist_lars.errors import UserError
from dist_lars.plan import Plan, make_plan, planned_images

KEYS = {
    "name", "title", "data", "note", "base", "on_path", "axes", "where", "select", "final", "report",
}  # fmt: skip
REPORT = {"x", "series", "reference", "against"}
ON_PATH = KEYS & {"base", "axes", "where", "select", "final"}
# Of a sweep: `epochs` for all cells alike, or their `share` of each cell's own; neither: all of them.
SELECT = {"hold_out": 0.1, "epochs": None, "share": None, "seeds": [0], "factors": [1.0], "extend": 0}
FINAL = {"seeds": [1, 2, 3], "options": {}}
KINDS = {"title": str, "data": str, "note": str, "base": dict, "on_path": dict, "axes": dict, "where": list,
         "select": dict, "final": dict, "report": dict}  # fmt: skip
SELECT_KINDS = {"hold_out": float, "epochs": int, "share": float, "extend": int, "seeds": list, "factors": list}
FINAL_KINDS = {"seeds": list, "options": dict}
WORDS = {str: "text", dict: "keys with values", list: "a list", int: "a whole number", float: "a share such as 0.1"}
# Read here, also where a study leaves them at their defaults.
NEEDED = ("batch_size", "epochs", "model.name", "schedule.warmup_epochs")
# What is decided for each run, here and by its runner, whatever a command says.
OWN = {
    "name", "run_dir", "seed", "optim.lr", "log.every_steps", "log.eval_epochs", "log.progress", "log.tensorboard",
    "log.trust_steps",
}  # fmt: skip
Options = dict[str, Any]
Records = Mapping[str, Mapping[str, Any]]  # by run


@dataclass(frozen=True)
class Study:
    """A STUDY.yaml, checked."""

    name: str
    title: str
    data: str  # which images the records speak of
    note: str  # what the reader of the report must know
    axes: dict[str, dict[str, Options]]  # axis -> label -> options
    base: Options
    where: list[dict[str, Any]]
    select: dict[str, Any] | None
    final: dict[str, Any]
    report: dict[str, Any]
    given: Options = field(default_factory=dict)  # by the command: all runs have them

    @property
    def series(self) -> str:
        """The axis whose labels are compared: one line each in the plots."""
        return self.report.get("series", list(self.axes)[-1])

    def reference(self, label: str) -> str:
        """What a label of the series is compared with: one for all, but for those that `against` gives their own."""
        return self.report.get("against", {}).get(label, self.report["reference"])


@dataclass(frozen=True)
class Cell:
    """One combination of labels."""

    labels: dict[str, str]
    options: Options = field(repr=False)

    @property
    def key(self) -> str:
        """The labels as one word, as records name the cell."""
        return " | ".join(self.labels.values())

    def beside(self, axis: str) -> str:
        """What it shares with the cells that it is compared with: every label but that axis's."""
        return " | ".join(v for k, v in self.labels.items() if k != axis)


@dataclass(frozen=True)
class Run:
    """One training."""

    cell: Cell
    stage: str  # select | final
    factor: float  # of the cell's own learning rate
    seed: int
    options: Options = field(repr=False)

    @property
    def id(self) -> str:
        """A digest of the options that decide what is computed, however many ranks compute it."""
        defaults = as_flat(Config())
        flat = as_flat(from_flat(self.options))
        given = {k: v for k, v in flat.items() if v != defaults[k] and not k.startswith(MAY_DIFFER_ON_RESUME)}
        return hashlib.sha256(json.dumps(plain(given), sort_keys=True).encode()).hexdigest()[:12]

    def plan(self) -> Plan:
        """Steps and rates, on one rank."""
        return plan_of(self.options)


def plan_of(options: Options, ranks: int = 1) -> Plan:
    """The arithmetic of a run with these options."""
    config = from_flat(options)
    return make_plan(config, ranks, *planned_images(config))


# --- the file ---------------------------------------------------------------------------------------------------------


def load(path: Path, path_given: bool = False, overrides: Options | None = None) -> Study:
    """Read and check a study; `path_given`: the user named images, for which `on_path` may hold other options."""
    raw = _read(path)
    other = raw.get("on_path") if path_given else None
    if other:
        raw = _on_path(raw, other)
    select, final, given = raw.get("select"), raw.get("final") or {}, typed_options(overrides or {})
    _refuse(raw, select or {}, final, path)
    study = Study(
        name=str(raw.get("name", path.stem)) + ("-own" if other else ""),
        title=raw.get("title", ""),
        data="the images of --data.path" if other else raw["data"],
        note="" if other else " ".join(raw.get("note", "").split()),
        axes={axis: _labels(axis, labels) for axis, labels in raw["axes"].items()},
        base={key: LEAVES[key].default for key in NEEDED} | _options(raw.get("base", {})) | given,
        where=[_rule(rule, raw["axes"]) for rule in raw.get("where", [])],
        select=None if select is None else {**SELECT, **select},
        final={**FINAL, **final, "options": _options(final.get("options", {}))},
        report=_report(raw.get("report", {})),
        given={k: v for k, v in given.items() if k == "data.val_images" or not k.startswith(MAY_DIFFER_ON_RESUME)},
    )
    _refuse_report(study)
    _refuse_options(study, given, path)
    for cell in cells(study):
        plan_of(cell.options)  # every option and batch is refused now, not after hours
    return study


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"study {path}: {e.strerror}{_like(path)}") from e
    except OSError as e:
        raise UserError(f"study {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"study {path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict) or not raw.get("axes"):
        raise UserError(f"study {path} needs `axes`: what varies, and the options of each label")
    if not raw.get("data"):
        raise UserError(f"study {path} needs `data`: a line that says which images these are")
    return {key: value for key, value in raw.items() if value is not None}


def _refuse(raw: dict[str, Any], select: dict[str, Any], final: dict[str, Any], path: Path) -> None:
    """What is misspelt or of the wrong kind."""
    _known(raw, KEYS, f"study {path}")
    for where, found, kinds in (("study", raw, KINDS), ("select", select, SELECT_KINDS), ("final", final, FINAL_KINDS)):
        for key, kind in kinds.items():
            if found.get(key) is not None and not isinstance(found[key], kind):
                raise UserError(f"{where}: {key} is {found[key]!r}, but it must be {WORDS[kind]}")
    _known(select, SELECT, "select")
    _known(final, FINAL, "final")
    _known(raw.get("report", {}), REPORT, "report")
    name = raw.get("name", path.stem)
    if not re.fullmatch(r"[\w.-]+", str(name)):
        raise UserError(f"study {path}: its name {name!r} becomes part of file names: letters, digits, _ . - alone")
    if select.get("epochs") and select.get("share"):
        raise UserError("select: either `epochs`, one number for all cells, or their `share` of each cell's own")
    if not 0 < select.get("hold_out", 0.1) < 1:
        raise UserError(f"select: hold_out is {select['hold_out']}, but it must be a share of the training images")
    for part, key, kind in (("select", "factors", int | float), ("select", "seeds", int), ("final", "seeds", int)):
        found = (select if part == "select" else final).get(key, [1])
        if not found or len(set(found)) < len(found) or not all(isinstance(n, kind) and n is not True for n in found):
            words = "whole numbers" if kind is int else "numbers"
            raise UserError(f"{part}: {key} is {found!r}, but it must be {words}, each once, such as [1, 2, 3]")


def _report(raw: dict[str, Any]) -> dict[str, Any]:
    """Labels as the axes have them: a batch of 256 is called "256"."""
    words = {key: str(value) for key, value in raw.items() if key != "against"}
    against = {str(key): str(value) for key, value in raw.get("against", {}).items()}
    return words | ({"against": against} if against else {})


def _refuse_report(study: Study) -> None:
    """Axes and labels that the study does not have: the report comes last, when all is trained."""
    asked, against = study.report, study.report.get("against", {})
    _known([asked[key] for key in ("x", "series") if key in asked], study.axes, "report: x and series are axes")
    labels = study.axes[study.series]
    _known([asked["reference"]] if "reference" in asked else [], labels, "report: reference")
    _known([*against, *against.values()], labels, "report: against")
    if against and "reference" not in asked:
        raise UserError("report: against gives some labels a reference of their own: the others need `reference`")


def _refuse_options(study: Study, given: Options, path: Path) -> None:
    """Options of the command that would undo what the study is about."""
    varied = {key for labels in study.axes.values() for own in labels.values() for key in own}
    varied |= {key for rule in study.where for key in rule["set"]}
    for key in given:
        if key in OWN or (key == "data.hold_out" and study.select):
            raise UserError(f"--{key} is what a study sets for each run: change it in a copy of {path}")
        if key in varied:
            raise UserError(f"--{key} is what cells of the study differ in: change it in a copy of {path}")


def _like(path: Path) -> str:
    for folder in (path.parent, Path(__file__).parent / "studies"):
        names = {other.name: other for other in sorted(folder.glob("*.yaml"))}
        if close := difflib.get_close_matches(path.name.removesuffix(".yaml") + ".yaml", names, n=1, cutoff=0.8):
            return f"; did you mean {os.path.relpath(names[close[0]])}?"
    return ""


def _on_path(raw: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The study for images of the user's own: other options, labels and epochs, the same question."""
    _known(other, ON_PATH, "on_path")
    merged = {key: {**(raw.get(key) or {}), **other[key]} for key in ("axes", "select", "final") if key in other}
    base = _options(raw.get("base", {})) | _options(other.get("base", {}))
    return {**raw, **merged, "base": base, "where": other.get("where", raw.get("where", []))}


def _known(given: Iterable[str], known: Iterable[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")


def _options(raw: Mapping[str, Any]) -> Options:
    """Nested or dotted options as a flat dict; `preset: NAME` stands for the preset's."""
    raw = dict(raw)
    preset = raw.pop("preset", None)
    flat = flat_yaml(preset_text(preset), preset) if preset else {}
    return typed_options(flat | flat_yaml(yaml.safe_dump(raw), "options"))


def _labels(axis: str, labels: Any) -> dict[str, Options]:
    """`batch_size: [256, 512]` is short for `batch_size: {256: {batch_size: 256}, ...}`."""
    if isinstance(labels, list):
        return {str(value): typed_options({axis: value}) for value in labels}
    if not isinstance(labels, dict) or not all(isinstance(own, dict | None) for own in labels.values()):
        raise UserError(f"axes: {axis} is {labels!r}, but it must be labels with their options, or values of an option")
    return {str(label): _options(options or {}) for label, options in labels.items()}


def _rule(rule: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """`{arm: [A, B], network: C, set: {...}}`: options of the cells that have these labels."""
    _known(set(rule), {*axes, "set"}, "where")
    if not isinstance(rule.get("set"), dict):
        raise UserError(f"where: {dict(rule)} needs `set`: the options of the cells with these labels")
    wanted = {k: [str(x) for x in (v if isinstance(v, list) else [v])] for k, v in rule.items() if k != "set"}
    for axis, labels in wanted.items():
        _known(labels, [str(label) for label in axes[axis]], f"where: {axis}")
    return {"labels": wanted, "set": _options(rule["set"])}


# --- cells and runs ---------------------------------------------------------------------------------------------------


def cells(study: Study) -> list[Cell]:
    """Every combination of labels; the first axis varies slowest, and so what it lists first is run first."""
    found = []
    for combination in itertools.product(*(labels.items() for labels in study.axes.values())):
        labels = dict(zip(study.axes, (label for label, _ in combination), strict=True))
        options = dict(study.base)
        for _, own in combination:
            options |= own
        for rule in study.where:
            if all(labels[axis] in wanted for axis, wanted in rule["labels"].items()):
                options |= rule["set"]
        found.append(Cell(labels, options))
    return found


def groups(study: Study) -> list[list[Cell]]:
    """Cells that are compared with one another: they differ in the series alone."""
    found: dict[str, list[Cell]] = {}
    for cell in cells(study):
        found.setdefault(cell.beside(study.series), []).append(cell)
    return list(found.values())


def runs(study: Study, records: Records) -> list[Run]:
    """Every run that is known by now, finished or not: later ones depend on what the records say.

    First every cell with one seed, so that there soon is a table, then the other seeds.

    Two cells that come to the same options have a run each here, with one id: it is trained once and counts for both.
    """
    found, later = [], []
    for group in groups(study):
        factors = sweeps(study, group, records)
        found += [run for cell in group for run in sweep(study, cell, factors[cell.key])]
        best = [
            factor for cell in group
            if (factor := chosen(study, cell, factors[cell.key], records) if study.select else 1.0) is not None
        ]  # fmt: skip
        if len(best) < len(group):  # sweeps that are not over may still be extended, those of the whole group
            continue
        for cell, factor in zip(group, best, strict=True):
            first, *others = (final_run(study, cell, factor, seed) for seed in study.final["seeds"])
            found.append(first)
            later += others
    return found + later


def sweep(study: Study, cell: Cell, factors: Sequence[float]) -> list[Run]:
    """The runs that choose a cell's learning rate."""
    if not study.select:
        return []
    return [select_run(study, cell, factor, seed) for factor in factors for seed in study.select["seeds"]]


def select_run(study: Study, cell: Cell, factor: float, seed: int) -> Run:
    """One of them: on the training images but for those held out, which judge it after every epoch."""
    s = study.select or SELECT
    whole = cell.options["epochs"]
    epochs = min(s["epochs"] or max(1, round(whole * (s["share"] or 1))), whole)  # --epochs 1 shortens both
    share = epochs / whole
    own = {"epochs": epochs, "data.hold_out": s["hold_out"], "log.eval_epochs": 1}
    if "schedule.warmup_epochs" in cell.options:  # a shorter training warms up for the same share of it
        own["schedule.warmup_epochs"] = cell.options["schedule.warmup_epochs"] * share
    return _run(cell, "select", factor, seed, own)


def final_run(study: Study, cell: Cell, factor: float, seed: int) -> Run:
    """One run at the chosen rate: it meets the validation images once, at its end."""
    return _run(cell, "final", factor, seed, {"log.eval_epochs": 10**6, **study.final["options"]})


def _run(cell: Cell, stage: str, factor: float, seed: int, own: Options) -> Run:
    options = {**cell.options, **own, "seed": seed}
    rate = float(f"{factor * plan_of(cell.options).rate.peak:.6g}")
    # The rate stands for itself, so that rules which arrive at the same one share the run.
    for key in ("schedule.scaling", "schedule.base_lr", "schedule.base_batch"):
        options.pop(key, None)
    plan = plan_of(options | {"optim.lr": rate})
    quiet = {"log.every_steps": 10**6, "log.trust_steps": max(1, plan.total_steps // 20), "log.tensorboard": False}
    return Run(cell, stage, factor, seed, {**options, **quiet, "log.progress": False, "optim.lr": rate})


# --- choosing the rate ------------------------------------------------------------------------------------------------


def score(study: Study, cell: Cell, factor: float, records: Records) -> float | None:
    """Mean top-1 on the images held out, -1 if a run diverged; None before all seeds are done."""
    found = [records.get(run.id) for run in sweep(study, cell, [factor])]
    if any(record is None for record in found):
        return None
    values = [-1.0 if record["state"] == "diverged" else record["top1"] for record in found if record]
    return -1.0 if min(values) < 0 else sum(values) / len(values)


def chosen(study: Study, cell: Cell, factors: Sequence[float], records: Records) -> float | None:
    """The factor of the best score, the smallest of equal ones; None before every one has been tried."""
    scores = [score(study, cell, factor, records) for factor in factors]
    if not scores or any(s is None for s in scores):
        return None
    return factors[scores.index(max(s for s in scores if s is not None))]


def at_edge(study: Study, cell: Cell, factors: Sequence[float], records: Records) -> bool:
    """Whether the best rate is the smallest or largest that was tried: a better one may lie beyond."""
    return len(factors) > 1 and chosen(study, cell, factors, records) in (factors[0], factors[-1])


def sweeps(study: Study, group: list[Cell], records: Records) -> dict[str, list[float]]:
    """The factors that each cell of a group tries, ascending, by the cell's key.

    While the best of any of them lies at its edge, every cell of the group gets one more, on the side of its own best:
    all have the same budget. At most `select.extend` times.
    """
    s = study.select
    if not s:
        return {cell.key: [] for cell in group}
    factors = {cell.key: sorted(map(float, s["factors"])) for cell in group}
    for _ in range(s["extend"]):
        best = {cell.key: chosen(study, cell, factors[cell.key], records) for cell in group}
        if None in best.values() or not any(at_edge(study, cell, factors[cell.key], records) for cell in group):
            break
        factors = {key: _longer(tried, best[key]) for key, tried in factors.items()}
    return factors


def _longer(tried: list[float], best: float | None) -> list[float]:
    ratio = tried[1] / tried[0] if len(tried) > 1 else 2.0
    upward = tried.index(best or tried[-1]) >= (len(tried) - 1) / 2
    return [*tried, tried[-1] * ratio] if upward else [tried[0] / ratio, *tried]
