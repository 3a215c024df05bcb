"""Measure the knobs of gradient exchange on the machine at hand, and write what surely helps as YAML for `--config`.

    python -m benchmarks.tune --model resnet18 --ranks 2 --out comm.yaml
    python -m dist_lars.train --preset resnet18_8k --config comm.yaml

One knob at a time: all its values train side by side in turns, with everything else as it is by default, and a value
that is faster by more than its interval leaves open is put down. Among many values one is so by luck, and two that help
alone may not help together: at the end all that were put down train together, against the defaults once more. The file
has them only if they are surely faster there, too; else it leaves the defaults as they are. `--wire` also tries 16-bit
gradients, which change the sums, so they are never chosen without being asked for.

`default` stands for the defaults of dist_lars on this machine; `again` is a second group of just that. It and values
that are the default say how far apart equals are measured, and are never chosen. `Horovod's own defaults` are those
that Horovod and Open MPI have where nobody sets anything. Ranks get one thread each unless OMP_NUM_THREADS says more.

Horovod's own autotuner (HOROVOD_AUTOTUNE) is not used: it changes its knobs in the middle of a training, knows nothing
of our buckets, and has no interval, so that on a noisy machine it settles on noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import record, show
from benchmarks.group import Group, close_all, count, described, in_turn, launch_options
from benchmarks.scaling import warm_up
from benchmarks.scaling_results import Case, Measured, ratio
from dist_lars.checkpoint import write_aside
from dist_lars.comm import Backend

GRID: dict[str, tuple[Any, ...]] = {
    "comm.cycle_ms": (1.0, 5.0, 20.0),
    "comm.bucket_mb": (5.0, 100.0),
    "comm.fusion_mb": (0.0, 128.0),
    "comm.cache": (0,),
    "comm.hierarchical": (True,),  # where there are several hosts
}
WIRES = ("fp16", "bf16")
VARIABLES = ("comm.cycle_ms", "comm.fusion_mb", "comm.cache", "comm.hierarchical")  # what these set is in UNSET
UNSET = {  # what Horovod and Open MPI take where a variable is not set
    "HOROVOD_CYCLE_TIME": "1",
    "HOROVOD_FUSION_THRESHOLD": "134217728",
    "HOROVOD_CACHE_CAPACITY": "1024",
    "HOROVOD_HIERARCHICAL_ALLREDUCE": "0",
    "OMPI_MCA_mpi_yield_when_idle": "0",
}
THEIRS = ("HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD", "OMPI_MCA_mpi_yield_when_idle")  # dist_lars sets these
Settings = Mapping[str, Any]  # options of the trainer, and variables of the environment in capitals


class Found:
    """What the turns of all knobs leave for the record."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.raw: dict[str, list[float]] = {}  # seconds of every step
        self.unsteady: list[str] = []
        self.told: dict[str, Any] = {}  # of the ranks with the defaults


def main() -> None:
    """Search, print, record, write."""
    args = parse()
    found = Found()
    theirs = {name: UNSET[name] for name in THEIRS}
    measure(args, "-", {"again": {}, "Horovod's own defaults": theirs}, found)
    tried: dict[str, Any] = {}
    for knob in args.knobs:
        if knob == "comm.hierarchical" and len(found.told["ranks_per_host"]) == 1:
            continue  # one host has no second level
        values = {str(value): value for value in (WIRES if knob == "comm.wire" else GRID[knob])}
        rows = measure(args, knob, {name: {knob: value} for name, value in values.items()}, found)
        if (best := choose(rows)) is not None:
            tried[knob] = values[best]
    chosen: dict[str, Any] = {}
    if tried:
        together = ", ".join(f"{knob.removeprefix('comm.')} {value}" for knob, value in tried.items())
        chosen = tried if choose(measure(args, "together", {together: tried}, found)) else {}
    path = record.write(
        args.name or f"tune_{args.model}", found.rows, found.raw, model=args.model, batch=args.batch,
        image_size=args.image_size, ranks=args.ranks, rounds=args.rounds, steps_per_round=args.steps,
        still_warming_up=found.unsteady, launcher=args.launcher, **found.told, tried_together=tried, chosen=chosen,
    )  # fmt: skip
    write_aside(args.out, as_yaml(chosen, path.stem).encode())
    verdict = f"surely faster: {chosen}" if chosen else "nothing is surely faster, the defaults stay"
    print(f"wrote {path.name} to benchmarks/records, and {args.out}: {verdict}")


def parse() -> argparse.Namespace:
    """The command line; `knobs` becomes a list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument("--batch", type=count, default=32, help="images per rank and pass")
    parser.add_argument("--image_size", type=count, default=224)
    parser.add_argument("--knobs", default=",".join(GRID), help="which to try")
    parser.add_argument("--wire", action="store_true", help="try 16-bit gradients, too")
    parser.add_argument("--steps", type=count, default=3, help="of one turn")
    parser.add_argument("--rounds", type=count, default=8, help="turns of each value; fewer than 6 choose nothing")
    launch_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the YAML file")
    parser.add_argument("--name", help="of the record (default: tune_MODEL)")
    args = parser.parse_args()
    if not args.out.parent.is_dir():  # minutes before it would be written
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    args.knobs = args.knobs.split(",")
    if unknown := [knob for knob in args.knobs if knob not in GRID]:
        parser.error(f"--knobs: there is no {', '.join(map(repr, unknown))}; choose from {', '.join(GRID)}")
    args.knobs += ["comm.wire"] if args.wire else []
    return args


def measure(
    args: argparse.Namespace, knob: str, candidates: Mapping[str, Settings], found: Found
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the candidates, which train in turns with the defaults; everything goes to `found`, too."""
    groups: dict[str, Group] = {}
    measured: dict[str, Measured] = {}
    try:
        for name, settings in {"default": {}, **candidates}.items():
            groups[name] = start(args, settings)
            measured[name] = Measured(Case(args.ranks, "horovod"), args.batch)
        found.unsteady += [f"{knob}={n}" for n, group in groups.items() if not warm_up(group, {"steps": args.steps})]
        in_turn(groups, lambda _: {"steps": args.steps}, args.rounds, lambda name, a: measured[name].add(a),
                lambda: False)  # fmt: skip
        facts = {name: group.facts[0] for name, group in groups.items()}
        found.told = {"ranks_per_host": groups["default"].hosts(), **described(facts["default"])}
    finally:
        close_all(list(groups.values()))
    rows = [row_of(knob, name, measured, is_default(settings, facts["default"]["environment"]))
            for name, settings in {"default": {}, **candidates}.items()]  # fmt: skip
    print(show.markdown(rows), flush=True)
    found.rows += rows
    found.raw |= {f"{knob}={name} rank {r}": seconds for name, m in measured.items() for r, seconds in m.raw().items()}
    return rows


def start(args: argparse.Namespace, settings: Settings) -> Group:
    """A training with these settings, ready."""
    variables = {name: value for name, value in settings.items() if name in UNSET}
    options = {name: value for name, value in settings.items() if name not in UNSET}
    sizes = {"data.image_size": args.image_size, "data.resize": args.image_size * 8 // 7}
    job = {"task": "train", "carrier": "horovod", "model": args.model, "batch": args.batch, "accumulation": 1,
           "wire": options.get("comm.wire", "fp32"), "options": {**sizes, **options}}  # fmt: skip
    return Group(job, args.ranks, args.launcher, args.hosts, **variables)


def is_default(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Whether ranks whose environment is this by default compute just the same with the settings."""
    asked = Backend(**{k.removeprefix("comm."): v for k, v in settings.items() if k in VARIABLES}).knobs()
    asked |= {name: value for name, value in settings.items() if name in UNSET}
    other = set(settings) - set(VARIABLES) - set(UNSET)
    return not other and all({**UNSET, **environment}[name] == value for name, value in asked.items())


def row_of(knob: str, name: str, measured: Mapping[str, Measured], same: bool) -> dict[str, Any]:
    """Images/s of a candidate, and its ratio to the default round by round."""
    speed = measured[name].speeds()
    seen = ratio("x default", speed, measured["default"].speeds())
    return {"knob": knob, "value": name, "images/s": float(np.median(speed)), "x default": seen["x default"],
            "low": seen["x default low"], "high": seen["x default high"],
            "is the default": same}  # fmt: skip


def choose(rows: list[dict[str, Any]]) -> str | None:
    """The fastest value that is surely faster than the default, if one is."""
    better = [row for row in rows if not row["is the default"] and row["low"] is not None and row["low"] > 1]
    return max(better, key=lambda row: row["x default"])["value"] if better else None


def as_yaml(chosen: dict[str, Any], origin: str) -> str:
    """What `--config` reads; without a choice it changes nothing."""
    options = {key.removeprefix("comm."): value for key, value in chosen.items()}
    head = f"# Measured by `python -m benchmarks.tune` (record {origin}); holds for that machine and network.\n"
    if not options:
        return head + "# No value was surely faster than the defaults, so they stay.\n{}\n"
    return head + yaml.safe_dump({"comm": options})


if __name__ == "__main__":
    main()
