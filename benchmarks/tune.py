"""Measure the knobs of gradient exchange on the machine at hand, and write what was fastest as YAML for `--config`.

    python -m benchmarks.tune --model resnet18 --ranks 2 --out comm.yaml
    python -m dist_lars.train --preset resnet18_8k --config comm.yaml

One knob at a time, beginning with the defaults: all values of a knob train side by side in turns, the fastest stays and
the next knob is tried with it. A value must be faster by more than its interval leaves open, or the default stays: a
knob that changes nothing here is left alone. `--wire` also tries 16-bit gradients, which change the sums, so they are
never chosen without being asked for. In the rows, `default` is what was chosen for the knobs before.

Horovod's own autotuner (HOROVOD_AUTOTUNE) is not used: it changes its knobs in the middle of a training, knows nothing
of our buckets, and has no interval, so that on a noisy machine it settles on noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record, show
from benchmarks.group import Group, close_all, described, in_turn, launcher_at_hand
from benchmarks.scaling import warm_up
from benchmarks.scaling_results import Case, Measured
from dist_lars.checkpoint import write_aside

GRID: dict[str, tuple[Any, ...]] = {
    "comm.cycle_ms": (None, 1.0, 5.0, 20.0),
    "comm.bucket_mb": (None, 5.0, 100.0),
    "comm.fusion_mb": (None, 0.0, 128.0),
    "comm.cache": (None, 0),
    "comm.hierarchical": (None, True),  # where there are several hosts
}
WIRES = (None, "fp16", "bf16")


def main() -> None:
    """Search, print, record, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="images per rank and pass")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--knobs", default=",".join(GRID), help="which to try, in this order")
    parser.add_argument("--wire", action="store_true", help="try 16-bit gradients, too")
    parser.add_argument("--steps", type=int, default=3, help="of one turn")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each value")
    parser.add_argument("--launcher", choices=("mpirun", "horovodrun", "srun"), default=launcher_at_hand())
    parser.add_argument("--out", type=Path, required=True, help="the YAML file")
    parser.add_argument("--name", help="of the record (default: tune_MODEL)")
    args = parser.parse_args()
    grid = {knob: GRID[knob] for knob in args.knobs.split(",")} | ({"comm.wire": WIRES} if args.wire else {})
    chosen: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    told: dict[str, Any] = {}
    raw: dict[str, list[float]] = {}
    for knob, values in grid.items():
        found = try_values(args, knob, values, chosen)
        if found is None:
            continue
        best, more, speeds, told = found
        rows, raw = rows + more, raw | speeds
        if best is not None:
            chosen[knob] = best
        print(show.markdown(more), flush=True)
    path = record.write(
        args.name or f"tune_{args.model}", rows, {}, model=args.model, batch=args.batch, image_size=args.image_size,
        ranks=args.ranks, launcher=args.launcher, **told, chosen=chosen, raw_images_per_s=raw,
    )  # fmt: skip
    write_aside(args.out, as_yaml(chosen, path.stem).encode())
    print(f"wrote {path.name} to benchmarks/records, and {args.out}: {chosen or 'the defaults are best'}")


def try_values(
    args: argparse.Namespace, knob: str, values: tuple[Any, ...], chosen: dict[str, Any]
) -> tuple[Any, list[dict[str, Any]], dict[str, list[float]], dict[str, Any]] | None:
    """(the fastest value, rows, images/s by value and round, where) with everything else as chosen so far."""
    groups: dict[str, Group] = {}
    case = Case(args.ranks, "horovod")
    measured: dict[str, Measured] = {}
    by_name = {"default" if v is None else str(v): v for v in values}
    try:
        for name, value in by_name.items():
            options = {**chosen, **({} if value is None else {knob: value})}
            groups[name] = start(args, options)
            measured[name] = Measured(case, args.batch)
            if knob == "comm.hierarchical" and len(groups[name].hosts()) == 1:
                return None  # one host has no second level
        for group in groups.values():
            warm_up(group, {"steps": args.steps})
        in_turn(groups, lambda _: {"steps": args.steps}, args.rounds, lambda name, a: measured[name].add(a),
                lambda: False)  # fmt: skip
        told = {"ranks_per_host": groups["default"].hosts(), **described(groups["default"].facts[0])}
    finally:
        close_all(list(groups.values()))
    speeds = {name: m.speeds().tolist() for name, m in measured.items()}
    rows = [row_of(knob, name, speeds) for name in by_name]
    return by_name[choose(rows)], rows, {f"{knob}={name}": values for name, values in speeds.items()}, told


def start(args: argparse.Namespace, options: dict[str, Any]) -> Group:
    """A training with these options, ready."""
    sizes = {"data.image_size": args.image_size, "data.resize": args.image_size * 8 // 7}
    job = {"task": "train", "carrier": "horovod", "model": args.model, "batch": args.batch, "accumulation": 1,
           "wire": options.get("comm.wire", "fp32"), "options": {**sizes, **options}}  # fmt: skip
    return Group(job, args.ranks, args.launcher)


def row_of(knob: str, name: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Images/s of a value, and its ratio to the default round by round."""
    ratio = record.ratio(speeds[name], speeds["default"])
    return {"knob": knob, "value": name, "images/s": record.summary(speeds[name])["median"],
            "x default": ratio["median"], "low": ratio["low"], "high": ratio["high"]}  # fmt: skip


def choose(rows: list[dict[str, Any]]) -> str:
    """The fastest value that is surely faster than the default, else the default."""
    better = [row for row in rows if row["low"] > 1]
    return max(better, key=lambda row: row["x default"], default={"value": "default"})["value"]


def as_yaml(chosen: dict[str, Any], origin: str) -> str:
    """What `--config` reads."""
    options = {key.removeprefix("comm."): value for key, value in chosen.items()}
    head = f"# Measured by `python -m benchmarks.tune` (record {origin}); holds for that machine and network.\n"
    return head + yaml.safe_dump({"comm": options} if options else {})


if __name__ == "__main__":
    main()
