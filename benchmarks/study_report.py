"""What the records of a study say: tables, tests, plots, and what is still to do.

Accuracies of a cell are given as mean and sample standard deviation over seeds. Two cells are compared by Welch's test
(unequal variances), with the 95 % interval of the difference; p values of one study are corrected by Holm's rule. A run
that diverged counts as guessing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import show, study_grid, study_plots
from benchmarks.study_grid import Cell, Study
from benchmarks.study_store import Store
from dist_lars.checkpoint import write_aside
from dist_lars.continuation import differences
from dist_lars.errors import UserError

Line = Mapping[str, Any]
LEARNED = 3.0  # points above guessing: less is no learning
DIFFERENCES = (
    "Points of top-1 by which the first of two arms, the reference, is ahead; Welch's test with its 95 % interval; "
    "`p, Holm` is corrected for the number of tests in this table."
)
LOSSES = (
    "Points of top-1 that an arm gains (below 0: loses) from the {x} in `against` to its own; where an arm has a "
    "reference, how many points less that one loses over the same step, with its 95 % interval; `p, Holm` is corrected "
    "for the number of these tests."
)
RUNS = (
    "Final runs. `rate` is the peak learning rate; a run that diverged has the top-1 of guessing, no top-5, no loss; "
    "seconds are medians over the seeds, `training` without evaluation and start, `CPU` with both."
)


class Compared(NamedTuple):
    """A minus b: the difference of means, its 95 % interval, and p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def accuracy(run: Line) -> float:
    """Top-1 in percent; guessing for a run that diverged."""
    return 100 / run["classes"] if run["state"] == "diverged" else run["top1"]


def welch(a: Sequence[float], b: Sequence[float]) -> Compared | None:
    """Welch's test of mean(a) = mean(b); None with fewer than two values on a side, or none that vary."""
    from scipy import stats

    if min(len(a), len(b)) < 2 or statistics.stdev(a) + statistics.stdev(b) == 0:
        return None
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Compared(statistics.mean(a) - statistics.mean(b), float(low), float(high), float(test.pvalue))


def contrast(plus: Sequence[Sequence[float]], minus: Sequence[Sequence[float]]) -> Compared | None:
    """Welch's test for a sum of means less another one, degrees of freedom by Welch and Satterthwaite."""
    from scipy import stats

    if min(map(len, [*plus, *minus])) < 2:
        return None
    parts = [(statistics.variance(values) / len(values), len(values) - 1) for values in [*plus, *minus]]
    squared = sum(part for part, _ in parts)
    if squared == 0:
        return None
    student = stats.t(squared**2 / sum(part**2 / freedom for part, freedom in parts))
    difference, error = sum(map(statistics.mean, plus)) - sum(map(statistics.mean, minus)), squared**0.5
    reach = float(student.ppf(0.975)) * error
    p = 2 * float(student.sf(abs(difference) / error))
    return Compared(difference, difference - reach, difference + reach, p)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, largest = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = largest
    return corrected


def mean_and_spread(values: Sequence[float]) -> str:
    """`71.2 ± 0.3 (3)`."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)})"


class Results:
    """The records of a study by cell."""

    def __init__(self, study: Study, records: study_grid.Records) -> None:
        self.study, self.records = study, records
        self.cells = study_grid.cells(study)
        self.factors = {k: v for group in study_grid.groups(study) for k, v in self._sweeps(group).items()}
        self.known = study_grid.runs(study, records)

    def _sweeps(self, group: list[Cell]) -> dict[str, list[float]]:
        return study_grid.sweeps(self.study, group, self.records)

    def of(self, cell: Cell, stage: str = "final") -> list[Line]:
        """The finished runs of a cell, in order."""
        mine = [run.id for run in self.known if run.cell.key == cell.key and run.stage == stage]
        return [self.records[name] for name in mine if name in self.records]

    def top1(self, cell: Cell) -> list[float]:
        """Accuracies of the final runs."""
        return [accuracy(run) for run in self.of(cell)]

    def trained(self, cell: Cell) -> bool:
        """Whether some rate of its sweep learned anything; True while no rate is chosen."""
        scores = [score for score in self.scores(cell).values() if score is not None]
        if not scores or len(scores) < len(self.factors[cell.key]):
            return True
        return max(scores) >= 100 / self.of(cell, "select")[0]["classes"] + LEARNED

    def scores(self, cell: Cell) -> dict[float, float | None]:
        """{factor: accuracy on the images held out}."""
        return {f: study_grid.score(self.study, cell, f, self.records) for f in self.factors[cell.key]}


# --- tables -----------------------------------------------------------------------------------------------------------


def write(study: Study, store: Store) -> str:
    """Write study-NAME.md and its plots beside the records; the report."""
    results = Results(study, store.runs())
    plots = study_plots.write(results, store.folder)
    parts = [
        tables(results),
        "## Plots",
        "\n\n".join(f"![{title}]({path.name})" for title, path in plots.items()),
        "## Machines",
        _where(store),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_aside(store.path.with_suffix(".md"), text.encode())
    return text


def refuse_other_options(study: Study, store: Store) -> None:
    """Records of which none is of this study with these options: its report would be one of nothing, over theirs."""
    records = store.runs()
    if records and not {run.id for run in study_grid.runs(study, records)} & set(records):
        raise UserError(
            f"{store.path} holds runs, but none with these options{_unlike(study, records)}: give those of the "
            f"records, or --records DIR for these"
        )


def _unlike(study: Study, records: study_grid.Records) -> str:
    """What a recorded run has other than the same one here would have."""
    for record in sorted(records.values(), key=lambda r: r["stage"]):  # a final run is nearest to the study's file
        for cell in study_grid.cells(study):
            if cell.labels == record["cell"]:
                same = study_grid.final_run if record["stage"] == "final" else study_grid.select_run
                options = same(study, cell, 1.0, record["seed"]).options
                lines = differences(record["options"], options)
                told = [line for line in lines if not line.startswith(("optim.lr:", "seed:"))]
                return f" ({'; '.join(told[:4])})" if told else ""
    return ""


def tables(results: Results) -> str:
    """The report but for the plots and the machines."""
    study = results.study
    parts = [f"# {study.title or study.name}", _state(results), _method(study), study.note]
    parts += ["## Top-1 accuracy, %", _main(results)]
    if table := _comparisons(results):
        parts += ["## Differences", DIFFERENCES, table]
    if table := _losses(results):
        parts += [f"## Against the smallest {study.report['x']}", LOSSES.format(x=study.report["x"]), table]
    parts += ["## Runs", RUNS, _details(results)]
    if study.select:
        parts += ["## How the learning rates were chosen", _rates(results)]
    return "\n\n".join(part for part in parts if part)


def header(study: Study, files: str | None = None) -> dict[str, Any]:
    """What the records say of the study itself; `files`: a digest of the images' names, where somebody looked."""
    asked = {"name": study.name, "title": study.title, "data": study.data, "select": study.select, "final": study.final}
    return asked | ({"files": files} if files else {})


def _state(results: Results) -> str:
    known = {run.id for run in results.known}
    complete = sum(len(results.of(c)) == len(results.study.final["seeds"]) for c in results.cells)
    state = "Complete" if complete == len(results.cells) else "In progress"
    others = len(set(results.records) - known)
    return (
        f"{results.study.data}. {state}: {complete} of {len(results.cells)} cells have all their seeds; "
        f"{len(known & set(results.records))} of {len(known)} runs that are known by now are done."
        + f" Not counted: {_count(others, 'run')} at rates that are not the best any more, or with other options."
        * bool(others)
    )


def _method(study: Study) -> str:
    seeds = _count(len(study.final["seeds"]), "seed")
    text = f"Mean ± standard deviation (runs) over {seeds}; the test images are read once, at the end of a run."
    if study.given:
        text += f" Options of the command: {', '.join(f'{key} {value}' for key, value in study.given.items())}."
    if study.select:
        s = study.select
        epochs = sorted({study_grid.sweep(study, c, [1.0])[0].options["epochs"] for c in study_grid.cells(study)})
        text += (
            f" The learning rate of every cell is the best of {len(s['factors'])} multiples of its rule's, on "
            f"{100 * s['hold_out']:g} % of the training images held out, with {_count(len(s['seeds']), 'seed')}"
            + (f" and {' or '.join(map(str, epochs))} epoch{'s' * (epochs != [1])}" if s["epochs"] else "")
            + (f" and {100 * s['share']:g} % of the epochs" if s["share"] else "")
            + f"; where a best one lies at the edge, every cell compared with it gets one more (up to {s['extend']})."
        )
    return text


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _main(results: Results) -> str:
    study, rows = results.study, {}
    for cell in sorted(results.cells, key=lambda c: study_plots.order(study, c)):
        labels = {k: v for k, v in cell.labels.items() if k != study.series}
        row = rows.setdefault(tuple(labels.values()), {**labels, "steps per epoch": _steps(cell)})
        row[cell.labels[study.series]] = mean_and_spread(results.top1(cell)) + _untrained(results, cell)
    return show.markdown(rows.values())


def _untrained(results: Results, *cells: Cell) -> str:
    return "" if all(map(results.trained, cells)) else ", no rate trained"


def _steps(cell: Cell) -> int:
    return study_grid.plan_of(cell.options).steps_per_epoch


def _comparisons(results: Results) -> str:
    """The reference of every series against it, in each group."""
    study, rows = results.study, []
    for group in study_grid.groups(study) if study.report.get("reference") else []:
        cells = {cell.labels[study.series]: cell for cell in group}
        ids = {label: tuple(run["id"] for run in results.of(cell)) for label, cell in cells.items()}
        pairs: dict[Any, list[str]] = {}  # arms that share their runs are one comparison, not two
        for label in cells:
            reference = study.reference(label)
            if ids[label] != ids[reference]:  # also under another name
                pairs.setdefault((ids[reference], ids[label]), []).append(label)
        for alike in pairs.values():
            other, reference = cells[alike[0]], study.reference(alike[0])
            a, b = results.top1(cells[reference]), results.top1(other)
            if min(len(a), len(b)) < 2:
                continue
            test = welch(a, b)
            rows.append(
                {
                    **{k: v for k, v in other.labels.items() if k != study.series},
                    "steps per epoch": _steps(other),
                    "difference": f"{reference} - {' = '.join(alike)}" + _untrained(results, cells[reference], other),
                    "points": f"{statistics.mean(a) - statistics.mean(b):.2f}",
                    "95 % interval": _points(test)["95 % interval"] if test else "no spread, no test",
                    "p": test.p if test else None,
                }
            )
    tested = [row for row in rows if row["p"] is not None]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p, Holm"], row["p"] = f"{corrected:.2g}", f"{row['p']:.2g}"
    return show.markdown(rows) if rows else ""


def _points(test: Any) -> dict[str, Any]:
    return {"points": f"{test.difference:.2f}", "95 % interval": f"{test.low:.2f} to {test.high:.2f}"}


def _losses(results: Results) -> str:
    """What every series loses from the first value of the x axis to each other one, and the reference less than it."""
    study, x = results.study, results.study.report.get("x")
    at = {tuple(cell.labels.items()): cell for cell in results.cells}
    rows, first = [], {}
    tests: dict[tuple[str, ...], float] = {}  # by the runs that they are of: arms may share theirs
    for cell in sorted(results.cells, key=lambda c: study_plots.order(study, c)) if x else []:
        rest = tuple(v for k, v in cell.labels.items() if k != x)
        base = first.setdefault(rest, cell)
        test = welch(results.top1(cell), results.top1(base)) if base is not cell else None
        if not test:
            continue
        row = {**cell.labels, "steps per epoch": _steps(cell), "against": base.labels[x], **_points(test)}
        row[study.series] += _untrained(results, cell, base)
        if study.report.get("reference"):
            own = study.reference(cell.labels[study.series])
            ours, ours_base = (at[tuple((c.labels | {study.series: own}).items())] for c in (cell, base))
            less = contrast(
                [results.top1(ours), results.top1(base)], [results.top1(ours_base), results.top1(cell)]
            ) if results.of(ours) != results.of(cell) else None  # fmt: skip
            if less:
                row["runs"] = tuple(run["id"] for c in (ours, base, ours_base, cell) for run in results.of(c))
                tests[row["runs"]] = less.p
                row |= {f"{k} that the reference loses less": v for k, v in _points(less).items()}
        rows.append(row)
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    for row in rows:
        if runs := row.pop("runs", None):
            row["p"], row["p, Holm"] = f"{tests[runs]:.2g}", f"{corrected[runs]:.2g}"
    return show.markdown(rows) if rows else ""


def _details(results: Results) -> str:
    rows = []
    for cell in sorted(results.cells, key=lambda c: study_plots.order(results.study, c)):
        runs = results.of(cell)
        if not runs:
            continue
        sound = [run for run in runs if run["state"] != "diverged"]
        rows.append(
            {
                **cell.labels,
                "epochs": runs[0]["epochs"],
                "steps per epoch": runs[0]["steps_per_epoch"],
                "rate": runs[0]["lr"],
                "top-1": mean_and_spread([accuracy(run) for run in runs]),
                "top-5": mean_and_spread([run["top5"] for run in sound]),
                "loss": mean_and_spread([run["loss"] for run in sound]),
                "diverged": len(runs) - len(sound),
                "training, s": round(statistics.median(run["seconds"] for run in runs)),
                "CPU, s": round(statistics.median(run["cpu_seconds"] for run in runs)),
            }
        )
    return show.markdown(rows) if rows else "None yet."


def _rates(results: Results) -> str:
    study, rows, warnings = results.study, [], []
    for cell in sorted(results.cells, key=lambda c: study_plots.order(study, c)):
        scores = {f: s for f, s in results.scores(cell).items() if s is not None}
        if not scores:
            continue
        rate = study_grid.plan_of(cell.options).rate.peak
        best = study_grid.chosen(study, cell, results.factors[cell.key], results.records)
        told = [
            f"{_bold(f'{f * rate:.3g}', f == best)}: {'diverged' if s < 0 else f'{s:.1f}'}" for f, s in scores.items()
        ]
        rows.append(
            {**cell.labels, "rule's rate": f"{rate:.3g}", "rate: top-1 on the images held out": ", ".join(told)}
        )
        if best is None:
            continue
        if not results.trained(cell):
            guessing = 100 / results.of(cell, "select")[0]["classes"]
            warnings.append(
                f"- **nothing learned**: {cell.key}: guessing gives {guessing:g}, so no rate was chosen here"
            )
        if study_grid.at_edge(study, cell, results.factors[cell.key], results.records):
            warning = f"- **at the edge**: {cell.key}: the best rate, {best * rate:.3g}, is the last one tried"
            inside = _inside(results, cell, best)
            warnings.append(warning + f"; {inside} has it inside its sweep" * bool(inside))
    return "\n\n".join([show.markdown(rows) if rows else "None yet.", "\n".join(warnings)]).strip()


def _inside(results: Results, cell: Cell, factor: float) -> str:
    """The arm compared with the cell that has tried rates on both sides of this one, if any: then no edge is there."""
    study = results.study
    wanted = [run.id for run in study_grid.sweep(study, cell, [factor])]
    for other in results.cells:
        if other.beside(study.series) == cell.beside(study.series):
            for f in results.factors[other.key][1:-1]:
                if [run.id for run in study_grid.sweep(study, other, [f])] == wanted:
                    return other.labels[study.series]
    return ""


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _where(store: Store) -> str:
    lines = []
    for line in store.lines():
        if line["kind"] == "machine":
            m, v = line["machine"], line["versions"]
            lines.append(
                f"- {line['id']}: {m['cpu']}, {m['cores']} cores, {line['precision']}, torch {v.get('torch')}, commit "
                f"{(line['git']['commit'] or 'unknown')[:12]}" + " with changes" * line["git"]["dirty"]
            )
    return "\n".join(lines)


# --- what is to do ----------------------------------------------------------------------------------------------------


def to_do(study: Study, records: study_grid.Records, shipped: study_grid.Records | None = None) -> str:
    """The runs that are missing, and what they cost at the speed of those that are done, or else of `shipped`."""
    results = Results(study, records)
    known = {run.id: run for run in results.known}
    missing = [run for name, run in known.items() if name not in records]
    later = {cell.key for cell in results.cells} - {run.cell.key for run in results.known if run.stage == "final"}
    own = [
        study_grid.final_run(study, c, 1.0, s) for c in results.cells if c.key in later for s in study.final["seeds"]
    ]
    waiting = list({run.id: run for run in own if run.id not in records}.values())
    speeds = _speeds(shipped or {}) | _speeds(records)
    lines = [f"{run.id}  {run.cell.key}  {run.stage}  x {run.factor:g}  seed {run.seed}" for run in missing]
    images: dict[str, float] = {}
    for run in [*missing, *waiting]:
        plan, name = run.plan(), run.options["model.name"]
        images[name] = images.get(name, 0) + plan.epochs * plan.steps_per_epoch * plan.batch_size
    said = f"{len(known) - len(missing)} runs done, {len(missing)} to do"
    if waiting:
        said += f", {len(waiting)} more when the rates are chosen, and those that extend a sweep"
    lines.append(said + ": complete" * (not missing and not waiting))
    for name, count in images.items():
        cost = f", about {count / speeds[name] / 3600:.1f} hours of one core" if name in speeds else ""
        lines.append(f"{name}: {count / 1e6:.1f} million images{cost}")
    return "\n".join(lines)


def _speeds(records: study_grid.Records) -> dict[str, float]:
    """Images per second of CPU by network, evaluation and start included."""
    found: dict[str, list[float]] = {}
    for run in records.values():
        if run["state"] == "finished":
            count = run["epochs"] * run["steps_per_epoch"] * run["options"]["batch_size"]
            found.setdefault(run["options"]["model.name"], []).append(count / max(run["cpu_seconds"], 1e-9))
    return {name: statistics.median(values) for name, values in found.items()}
