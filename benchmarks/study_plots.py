"""The plots of a study: accuracy, learning curves, learning rates, trust ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import study_grid
from benchmarks.study_grid import Cell, Study

if TYPE_CHECKING:
    from benchmarks.study_report import Results

Line = dict[str, Any]


def order(study: Study, cell: Cell) -> tuple[Any, ...]:
    """Where a cell stands in tables and plots: numbers by size, whatever the order in which they are run."""
    x = study.report.get("x")
    rest = [list(study.axes[axis]).index(label) for axis, label in cell.labels.items() if axis not in (x, study.series)]
    return (
        *rest,
        _number(cell.labels[x]) if x else 0.0,
        list(study.axes[study.series]).index(cell.labels[study.series]),
    )


def _number(label: str) -> float:
    try:
        return float(label.replace(",", ""))
    except ValueError:
        return 0.0


def head(cell: Cell, *left_out: str | None) -> str:
    """Of a frame: the labels of the axes that do not vary in it."""
    return ", ".join(f"{k} {v}" if _number(v) else v for k, v in cell.labels.items() if k not in left_out)


def write(results: Results, folder: Path) -> dict[str, Path]:
    """Draw what there are records for; {title: file}."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn, swept = {}, results.study.select
    for name, title, draw in (
        ("accuracy", "Top-1 accuracy" + ("; hollow where no rate of the sweep trained" if swept else ""), accuracy),
        ("curves", "Accuracy on augmented training images while training", curves),
        ("rates", "Top-1 on the images held out, against the learning rate", rates),
        ("trust", "Trust ratios of every tensor, one seed; dashed: biases and BatchNorm", trust),
    ):
        path = folder / f"study-{results.study.name}-{name}.png"
        figure = draw(results)
        if figure is None:
            continue
        figure.savefig(path, dpi=90)
        drawn[title] = path
    return drawn


def _frames(titles: Iterable[str], columns: int, share_y: bool = True) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot as plt

    titles = list(titles)
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    size = (max(7.0, 3.6 * columns), 3.4 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=share_y, squeeze=False, layout="constrained")
    plt.close(figure)  # it is drawn on, not shown
    frames = list(grid.flat)
    for frame, title in zip(frames, titles, strict=False):
        frame.set_title(title, fontsize=9)
        frame.grid(alpha=0.3)
    for frame in frames[len(titles) :]:
        frame.set_visible(False)
    return figure, frames


def _colour(study: Study, label: str) -> str:
    return f"C{list(study.axes[study.series]).index(label) % 10}"


def _legend(figure: Any, frames: list[Any]) -> None:
    """One for all frames, below them, where it covers no point."""
    drawn = {
        label: handle for frame in frames for handle, label in zip(*frame.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=int(figure.get_figwidth() // 2.2), fontsize=7
    )


def _line(study: Study, label: str) -> Line:
    """The first one solid, the others dashed in turn: where arms have the same values, several show."""
    number = list(study.axes[study.series]).index(label)
    style = ("--", ":", "-.")[number % 3] if number else "-"
    return {"color": _colour(study, label), "label": label, "linestyle": style}


def _by(cells: list[Cell], key: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return found


def accuracy(results: Results) -> Any:
    """Means over seeds with their spread: over x one line per series, without an x one bar."""
    study, x = results.study, results.study.report.get("x")
    cells = sorted((c for c in results.cells if results.top1(c)), key=lambda c: order(study, c))
    if not cells:
        return None
    panels = _by(cells, lambda c: head(c, x, study.series))
    figure, frames = _frames(panels, 2, share_y=not x)
    for frame, mine in zip(frames, panels.values(), strict=False):
        for label, points in _by(mine, lambda c: c.labels[study.series]).items():
            values = [results.top1(c) for c in points]
            means = [statistics.mean(v) for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            where = [c.labels[x] for c in points] if x else [label]
            if x and all(_number(w) for w in where):
                places, style = [_number(w) for w in where], {"marker": "o", **_line(study, label)}
                frame.set_xscale("log", base=2)
            else:
                places, style = where, {"marker": "o", **_line(study, label), "linestyle": ""}
            frame.errorbar(places, means, yerr=spread, capsize=3, **style)
            lost = [i for i, c in enumerate(points) if not results.trained(c)]
            frame.plot(
                [places[i] for i in lost], [means[i] for i in lost], "o", color=_colour(study, label), mfc="w", zorder=4
            )
        if x:
            _ticks(frame, mine, x)
        else:
            frame.margins(x=0.2)
            for name in frame.get_xticklabels():
                name.set(fontsize=7)
                if len(study.axes[study.series]) > 3:
                    name.set(rotation=25, ha="right", rotation_mode="anchor")
        frame.set_ylabel("top-1, %: mean, standard deviation", fontsize=8)
    if x:
        _legend(figure, frames)
    return figure


def _ticks(frame: Any, cells: list[Cell], x: str) -> None:
    """Each value of x, with the steps that an epoch has there."""
    steps = {c.labels[x]: study_grid.plan_of(c.options).steps_per_epoch for c in cells}
    if all(_number(label) for label in steps):
        frame.set_xticks(
            [_number(label) for label in steps], [f"{label}\n{n}" for label, n in steps.items()], fontsize=7
        )
        frame.minorticks_off()
        frame.set_xlabel(f"{x}, and below it the steps per epoch", fontsize=8)


def curves(results: Results) -> Any:
    """One frame for each group that is compared; means over seeds."""
    study = results.study
    cells = sorted((c for c in results.cells if results.of(c)), key=lambda c: order(study, c))
    if not cells:
        return None
    groups = _by(cells, lambda c: head(c, study.series))
    figure, frames = _frames(groups, 5)
    for frame, mine in zip(frames, groups.values(), strict=False):
        for cell in mine:
            histories = [run["train_top1"] for run in results.of(cell) if run["state"] != "diverged"]
            if histories:
                mean = np.mean(histories, axis=0)
                frame.plot(range(1, len(mean) + 1), mean, **_line(study, cell.labels[study.series]))
        frame.set_xlabel("epoch", fontsize=8)
    _legend(figure, frames)
    frames[0].set_ylabel("training top-1, %")
    return figure


def rates(results: Results) -> Any:
    """One frame for each group; a cross where a run diverged."""
    study = results.study
    found = [c for c in results.cells if any(s is not None for s in results.scores(c).values())]
    if not study.select or not found:
        return None
    groups = _by(sorted(found, key=lambda c: order(study, c)), lambda c: head(c, study.series))
    figure, frames = _frames(groups, 5)
    for frame, mine in zip(frames, groups.values(), strict=False):
        for cell in mine:
            rate, label = study_grid.plan_of(cell.options).rate.peak, cell.labels[study.series]
            points = [(f * rate, s) for f, s in results.scores(cell).items() if s is not None]
            sound, lost = [p for p in points if p[1] >= 0], [p for p in points if p[1] < 0]
            frame.plot(*zip(*sound, strict=True), marker=".", **_line(study, label)) if sound else None
            frame.plot([p[0] for p in lost], [0] * len(lost), "x", color=_colour(study, label))
        frame.set_xscale("log")
        frame.set_xlabel("learning rate", fontsize=8)
    _legend(figure, frames)
    frames[0].set_ylabel("top-1 held out, %")
    return figure


def trust(results: Results) -> Any:
    """One frame for each cell with adapted tensors: a line per tensor, dark near the images, bright near the loss."""
    import torch
    from matplotlib import colormaps

    from dist_lars.models import build

    study = results.study
    traced = [(c, run) for c in results.cells for run in results.of(c)[:1] if "trust_ratios" in run]
    if not traced:
        return None
    traced.sort(key=lambda pair: order(study, pair[0]))
    networks = {run["options"]["model.name"] for _, run in traced}
    with torch.device("meta"):
        dimensions = {n: {k: p.ndim for k, p in build(n, num_classes=10).named_parameters()} for n in networks}
    figure, frames = _frames([head(c) for c, _ in traced], 5)
    for frame, (_, run) in zip(frames, traced, strict=False):
        ratios = run["trust_ratios"]
        for depth, (name, values) in enumerate(ratios.items()):
            colour = colormaps["viridis"](0.95 * depth / max(1, len(ratios) - 1))
            style = "--" if dimensions[run["options"]["model.name"]].get(name) == 1 else "-"
            frame.plot(run["trust_steps"], values, linewidth=0.8, color=colour, linestyle=style)
        frame.set_yscale("log")
        frame.set_xlabel("step", fontsize=8)
    frames[0].set_ylabel("trust ratio, first layer dark, last bright", fontsize=7)
    return figure
