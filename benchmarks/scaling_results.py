"""What follows from the times of `benchmarks.scaling`: speeds, efficiencies, parts of a step, hours, comparisons."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np

from benchmarks import record
from benchmarks.group import LEAST
from dist_lars.cli import load_config

# Of a step: waiting for a batch; copying and normalising it; model and loss; backward; waiting for what of the
# all-reduces is not through when backward ends; the optimizer; everything between.
PARTS = ("data", "input", "forward", "backward", "wait", "optimizer", "rest")
RECIPES = {"resnet18": "resnet18_8k", "alexnet": "alexnet_8k", "alexnet_bn": "alexnet_bn_8k", "resnet50": "resnet50_8k"}


TOTAL = "of ceiling, total"
RATIOS = ("of 1 rank", "of 1 node", "of ceiling", "in step", "of DDP")


class Case(NamedTuple):
    """One group: so many ranks, and who carries their gradients (`none`: independent trainings, the ceiling)."""

    ranks: int
    carrier: str
    wire: str = "fp32"
    passes: int = 1
    data: str = "synthetic"

    def key(self) -> str:
        """As raw times are filed."""
        return f"{self.ranks} {self.carrier} {self.wire} x{self.passes} {self.data}"


class Measured:
    """The times of one case: seconds of each part of each step, by round, rank and step."""

    def __init__(self, case: Case, batch: int) -> None:
        self.case, self.batch = case, batch
        self.blocks: list[np.ndarray] = []  # each [ranks, steps, parts]
        self.apart: list[np.ndarray] = []  # the same of turns that only tell the parts
        self.cpu: list[list[float]] = []  # of the steps of one turn, of all ranks; all threads of a rank

    def add(self, answers: list[list[dict[str, float]]], apart: bool = False) -> None:
        """One turn."""
        block = np.array([[[step[p] for p in PARTS] for step in steps] for steps in answers])
        (self.apart if apart else self.blocks).append(block)
        if not apart:
            self.cpu.append([step["cpu"] for steps in answers for step in steps])

    def raw(self) -> dict[int, list[float]]:
        """Seconds of every step by rank."""
        return dict(enumerate(np.concatenate([block.sum(2) for block in self.blocks], axis=1).tolist()))

    def steps(self) -> np.ndarray:
        """Seconds of every step: of the slowest rank; of independent ones, the time that stands for their sum."""
        whole = np.concatenate([block.sum(2) for block in self.blocks], axis=1)
        return self.harmonic(whole) if self.case.carrier == "none" else whole.max(0)

    @staticmethod
    def harmonic(whole: np.ndarray) -> np.ndarray:
        """Ranks that do not wait for each other do sum(1 / seconds) steps a second together."""
        return whole.shape[0] / (1 / whole).sum(0)

    def apart_ms(self) -> float | None:
        """Milliseconds by which the slowest rank's own work exceeds the ranks' mean, step by step, on average.

        What ranks that wait for each other lose to a machine that is not equally fast everywhere; of independent ranks,
        what they would lose. None for DDP, which waits inside backward.
        """
        if self.case.carrier == "ddp" or self.case.ranks == 1:
            return None
        own = [i for i, part in enumerate(PARTS) if part not in ("wait", "rest")]
        whole = np.concatenate([block[:, :, own].sum(2) for block in self.apart or self.blocks], axis=1)
        return 1e3 * float((whole.max(0) - whole.mean(0)).mean())

    def seconds(self) -> np.ndarray:
        """Of a step, one number per round: of independent ranks, as `steps`."""
        return self.case.ranks * self.batch * self.case.passes / self.speeds()

    def speeds(self, in_step: bool = False) -> np.ndarray:
        """Images/s of all ranks, one number per round; `in_step`: as if independent ranks waited for each other."""
        return np.array([self._speed(block.sum(2), in_step) for block in self.blocks])

    def total(self) -> float:
        """Images/s of all rounds together: a straggler counts for as long as it lasted, which no median shows."""
        return self._speed(np.concatenate([block.sum(2) for block in self.blocks], axis=1))

    def _speed(self, whole: np.ndarray, in_step: bool = False) -> float:
        images = self.batch * self.case.passes * whole.shape[1]  # of a rank
        if self.case.carrier == "none" and not in_step:
            return float((images / whole.sum(1)).sum())
        return float(self.case.ranks * images / whole.max(0).sum())

    def parts(self) -> dict[str, float]:
        """Median milliseconds of each part over ranks and steps."""
        every = np.concatenate([block.reshape(-1, len(PARTS)) for block in self.apart or self.blocks])
        return {part: 1e3 * float(np.median(every[:, i])) for i, part in enumerate(PARTS)}

    def mean_parts(self) -> np.ndarray:
        """Milliseconds of each part, the mean over ranks and steps, by round: [rounds, parts]."""
        return 1e3 * np.array([block.mean((0, 1)) for block in self.apart or self.blocks])


def ceiling(measured: dict[str, Measured], case: Case) -> Measured | None:
    """The independent trainings that a case is held against; they have none themselves."""
    return None if case.carrier == "none" else measured.get(case._replace(carrier="none", wire="fp32").key())


def table(measured: dict[str, Measured], args: argparse.Namespace, hosts: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One row per case."""
    speeds = {m.case: m.speeds() for m in measured.values()}
    own_node = [c.ranks for c in speeds if len(hosts.get(f"{c.ranks} ranks", [])) == 1]
    whole = max(own_node, default=0)  # ranks of one node
    rows = []
    for case, speed in speeds.items():
        seen = interval("images/s", speed)
        row: dict[str, Any] = {
            "ranks": case.ranks, "carrier": case.carrier, "data": case.data, "wire": case.wire, "passes": case.passes,
            "images/s": seen["images/s"], "low": seen["images/s low"], "high": seen["images/s high"],
        }  # fmt: skip
        one = speeds.get(Case(1, "none", data=case.data))
        if one is not None and case.carrier != "none" and case.passes == 1:
            row |= ratio("of 1 rank", speed, case.ranks * one)
        node = speeds.get(case._replace(ranks=whole)) if whole > 1 else one if case.passes == 1 else None
        if node is not None and case.carrier != "none" and 0 < whole < case.ranks:
            row |= ratio("of 1 node", speed / case.ranks, node / whole)
        if alone := ceiling(measured, case):
            row |= ratio("of ceiling", speed, speeds[alone.case])
            row[TOTAL] = measured[case.key()].total() / alone.total()
            row |= ratio("in step", speed, alone.speeds(in_step=True))
        ddp = speeds.get(case._replace(carrier="ddp"))
        if ddp is not None and case.carrier not in ("none", "ddp"):
            row |= ratio("of DDP", speed, ddp)
        steps = measured[case.key()].steps()
        row |= {"steps": len(steps), "max/median": float(steps.max() / np.median(steps))}
        if len(steps) >= 100:
            row["p99/median"] = float(np.percentile(steps, 99) / np.median(steps))
        if case.carrier != "none" or case.ranks == 1:
            row |= time_to_end(row["images/s"], args, len(hosts.get(f"{case.ranks} ranks", [1])))
        rows.append(row)
    return rows


def ratio(name: str, values: np.ndarray, base: np.ndarray) -> dict[str, float | None]:
    """values / base, round by round: the median under `name`, its interval under `name low` and `name high`."""
    return interval(name, values / base)


def interval(name: str, values: np.ndarray) -> dict[str, float | None]:
    """The median under `name`, its interval under `name low` and `name high`: None where too few values tell none."""
    seen = record.summary(values.tolist())
    low, high = (seen["low"], seen["high"]) if len(values) >= LEAST else (None, None)
    return {name: seen["median"], f"{name} low": low, f"{name} high": high}


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as people read them: with intervals in their cells, and without columns that say nothing."""
    what = ["ranks", "carrier", *(k for k in ("data", "wire", "passes") if len({r[k] for r in rows}) > 1)]
    cells = []
    for r in rows:
        cell = {k: r[k] for k in what} | {"images/s": spread(r["images/s"], r["low"], r["high"], "{:.1f}")}
        for name in RATIOS:
            if any(name in other for other in rows):
                values = [r[f"{name}{end}"] for end in ("", " low", " high")] if name in r else []
                cell[name] = spread(*(v and 100 * v for v in values), "{:.1f}", " %") if values else ""
            if name == "of ceiling" and any(TOTAL in other for other in rows):  # older records have none
                cell[TOTAL] = f"{100 * r[TOTAL]:.1f} %" if TOTAL in r else ""
        cells.append(cell | {k: r[k] for k in ("steps", "max/median", "p99/median", "hours", "node-hours") if k in r})
    return cells


def shown_split(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of `split_rows`."""
    name = "over ceiling ms"
    return [
        {k: v for k, v in r.items() if not k.startswith(name)} | ({name: in_ms(r, name)} if name in r else {})
        for r in rows
    ]


def in_ms(row: dict[str, Any], name: str) -> str:
    """Milliseconds with their interval, as `interval` left them in the row."""
    return spread(*(row[f"{name}{end}"] for end in ("", " low", " high")), "{:.0f}")


def spread(median: float, low: float | None, high: float | None, form: str, unit: str = "") -> str:
    """A median and its interval, if it has one."""
    return form.format(median) + unit + ("" if low is None else f" ({form.format(low)} to {form.format(high)})")


def time_to_end(speed: float, args: argparse.Namespace, nodes: int) -> dict[str, float]:
    """Hours of all epochs of the recipe at this speed, evaluation not counted, and what is paid for them.

    Images of another size than the recipe's say nothing of it.
    """
    name = recipe(args)
    if name is None:
        return {}
    config = load_config(name)
    if args.image_size != config.data.image_size:
        return {}
    hours = config.epochs * config.data.train_images / speed / 3600
    return {"hours": hours, "node-hours": hours * nodes}


def recipe(args: argparse.Namespace) -> str | None:
    """The preset whose epochs count."""
    return args.recipe or RECIPES.get(args.model)


def split_rows(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Median milliseconds of the parts of a step and of the CPU, and what its rounds take beyond independent ranks'."""
    rows: list[dict[str, Any]] = []
    for m in measured.values():
        case = m.case
        row: dict[str, Any] = {"case": case.key(), "step ms": 1e3 * float(np.median(m.steps())), **m.parts()}
        row |= {"cpu ms": 1e3 * float(np.median(np.concatenate(m.cpu))), "ranks apart ms": m.apart_ms()}
        if alone := ceiling(measured, case):
            row |= interval("over ceiling ms", 1e3 * (m.seconds() - alone.seconds()))
        rows.append(row)
    return rows


def beyond_rows(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """What a rank spends in each part beyond an independent one, and Horovod's beyond DDP's: paired by rounds."""
    rows: list[dict[str, Any]] = []
    for m in measured.values():
        others = {"independent": ceiling(measured, m.case)}
        if m.case.carrier not in ("none", "ddp"):
            others["DDP"] = measured.get(m.case._replace(carrier="ddp").key())
        for name, other in others.items():
            if other is not None:
                more = m.mean_parts() - other.mean_parts()
                row: dict[str, Any] = {"case": m.case.key(), "beyond": name}
                for part, values in zip((*PARTS, "all"), [*more.T, more.sum(1)], strict=True):
                    row |= interval(f"{part} ms", values)
                cpu = [1e3 * (np.mean(a) - np.mean(b)) for a, b in zip(m.cpu, other.cpu, strict=True)]
                rows.append(row | interval("cpu ms", np.array(cpu)))
    return rows


def shown_beyond(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with intervals in the cells; the parts in which a carrier does nothing are left out."""
    names = [f"{part} ms" for part in (*PARTS, "all", "cpu") if part not in ("data", "input", "rest")]
    return [{"case": r["case"], "beyond": r["beyond"]} | {name: in_ms(r, name) for name in names} for r in rows]


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases that both records have: images/s of each, their ratio with what the intervals leave possible, efficiencies.

    Two machines or number formats may be compared; other work may not.
    """
    rows = []
    if unlike := [k for k in ("model", "mode", "batch", "image_size") if before.get(k) != after.get(k)]:
        told = ", ".join(f"{k} {before.get(k)} and {after.get(k)}" for k in unlike)
        raise SystemExit(f"the two records are of different work ({told}): nothing to compare")
    what = ("ranks", "carrier", "data", "wire", "passes")
    old = {tuple(row[k] for k in what): row for row in before["rows"]}
    for row in after["rows"]:
        key = tuple(row[k] for k in what)
        if key in old:
            a, b = old[key], row
            rows.append(
                {
                    **dict(zip(what, key, strict=True)), "before": a["images/s"], "after": b["images/s"],
                    "ratio": b["images/s"] / a["images/s"], "low": bound(b["low"], a["high"]),
                    "high": bound(b["high"], a["low"]),
                    **{f"{name} {when}": r[name] for name in RATIOS if name in a and name in b
                       for when, r in (("before", a), ("after", b))},
                }
            )  # fmt: skip
    if not rows:
        raise SystemExit("the two records have no case in common")
    return rows


def bound(after: float | None, before: float | None) -> float | None:
    """Of a ratio, where both records have intervals."""
    return None if after is None or before is None else after / before
