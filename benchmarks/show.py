"""Tables and plots of the rows of a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def markdown(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A Markdown table of the rows; numbers are right-aligned and have three digits."""
    rows = list(rows)
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(c, 0), int | float | None) for row in rows) for c in columns]
    lines = [columns, ["---:" if n else "---" for n in numeric]]
    lines += [[_cell(row.get(c, "")) for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float) or value == 0:
        return str(value)
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def plot(rows: Sequence[Mapping[str, Any]], path: Path, **how: Any) -> Path:
    """Draw the rows as PNG: `how` as for `draw`."""
    return plots(path, (rows, how))


def plots(path: Path, *panels: tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]) -> Path:
    """Draw several panels side by side as one PNG, each the rows and how to `draw` them; the first is the largest."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shares = [2] + [1] * (len(panels) - 1)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 + 4 * len(panels), 4.5), dpi=120, layout="constrained", squeeze=False,
        width_ratios=shares,
    )  # fmt: skip
    for place, (rows, how) in zip(axes[0], panels, strict=True):
        draw(place, rows, **how)
    figure.savefig(path)
    plt.close(figure)
    return path


def draw(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    x: str,
    y: str,
    series: str | None = None,
    kind: str = "bar",
    title: str = "",
    ylabel: str = "",
    references: Mapping[str, float] | None = None,
    logx: bool = False,
) -> None:
    """Draw `y` over `x`, one colour per `series`, `kind` "bar" or "line".

    Rows may carry `low` and `high`, which become error bars unless they are None, and the `line` of their series, ":"
    for one that was not measured; `references` are labelled horizontal lines, and `logx` makes the x axis of a line
    plot logarithmic.
    """
    from matplotlib.ticker import MaxNLocator

    ticks = list(dict.fromkeys(row[x] for row in rows))
    names = list(dict.fromkeys(row[series] for row in rows)) if series else [None]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in rows if series is None or row[series] == name]
        values = [row[y] for row in mine]
        errors = [[abs(row[y] - bound) if (bound := row.get(end)) is not None else 0.0 for row in mine]
                  for end in ("low", "high")]  # fmt: skip
        label = None if name is None else str(name)
        if kind == "line":
            style = mine[0].get("line", "-")
            axes.errorbar([row[x] for row in mine], values, yerr=errors, marker="" if style == ":" else "o", capsize=3,
                          label=label, linestyle=style)  # fmt: skip
        else:
            places = [ticks.index(row[x]) + (i + 0.5) * width - 0.4 for row in mine]
            axes.bar(places, values, width * 0.95, yerr=errors, capsize=2, label=label)
    if kind == "bar":
        axes.set_xticks(range(len(ticks)), [str(t) for t in ticks])
    elif all(isinstance(tick, int) for tick in ticks):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for label, height in (references or {}).items():
        axes.axhline(height, color="gray", linestyle=":", linewidth=1)
        axes.annotate(label, (1.0, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if logx:
        axes.set_xscale("log")
    axes.set(title=title, ylabel=ylabel or y, xlabel="" if kind == "bar" else x)
    axes.grid(axis="y", alpha=0.3)
    if series:
        axes.legend(fontsize=8)
