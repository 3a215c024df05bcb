"""One training step taken apart: its parts, every layer, and what of the communication hides behind backward.

    python -m benchmarks.step --model resnet18 --ranks 2

1. The parts of a step, of one rank alone and of `--ranks` ranks by Horovod.
2. Every layer: milliseconds forward and backward, parameters, one rank (for predictions of larger machines), and what
   of both falls to no layer, such as the loss: together they are the step's `forward` and `backward`.
3. Overlap, from Horovod's own timeline (HOROVOD_TIMELINE) of rank 0: when the all-reduce of each bucket ran. What is
   not through when the last rank's backward ends is exposed; until then the others wait for that rank (`ranks apart`),
   which no network could change. Beside it the same buckets with nothing else to do (stand-alone). Hosts' clocks are
   compared: over several hosts they must agree to a millisecond.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record, show
from benchmarks.group import Group, described, launcher_at_hand
from benchmarks.scaling_results import PARTS

TOLD = "ms from the last rank's end of backward"  # [bucket, begin, end] of the first steps


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="images per rank and pass")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=12, help="of each kind")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of dist_lars.train")
    parser.add_argument("--launcher", choices=("mpirun", "horovodrun", "srun"), default=launcher_at_hand())
    parser.add_argument("--name", help="of the record")
    args = parser.parse_args()
    alone = run_parts(args, 1, "none")
    found = {"1 rank alone": alone}
    extra: dict[str, Any] = {}
    if args.ranks > 1:
        many = found[f"{args.ranks} ranks, Horovod"] = run_parts(args, args.ranks, "horovod")
        extra["overlap"] = overlap(many["timeline"], many["backward_ended"], many["standalone"])
        extra["ranks_per_host"] = many["hosts"]
        print(show.markdown([{k: v for k, v in extra["overlap"].items() if not isinstance(v, list)}]))
    rows = [{"case": case, **median_parts(run["steps"])} for case, run in found.items()]
    raw = {f"{case}, rank {r}": [sum(step[p] for p in PARTS) for step in steps]
           for case, run in found.items() for r, steps in enumerate(run["steps"])}  # fmt: skip
    print(show.markdown(rows))
    print(show.markdown(sorted(alone["layers"], key=lambda r: -r["backward ms"])[:10]))
    name = args.name or f"step_{args.model}"
    path = record.write(name, rows, raw, model=args.model, batch=args.batch, image_size=args.image_size,
                        ranks=args.ranks, launcher=args.launcher, options=args.option,
                        **described(found[next(reversed(found))]), layers=alone["layers"], **extra)  # fmt: skip
    print(f"wrote {path.name} to benchmarks/records")


def run_parts(args: argparse.Namespace, ranks: int, carrier: str) -> dict[str, Any]:
    """Steps of every rank; of one rank its layers, of several the timeline and the stand-alone all-reduces."""
    options = dict(item.split("=", 1) for item in args.option)
    options |= {"data.image_size": args.image_size, "data.resize": args.image_size * 8 // 7}
    job = {"task": "train", "carrier": carrier, "model": args.model, "batch": args.batch, "accumulation": 1,
           "wire": "fp32", "options": options, "layers": ranks == 1}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        timeline = Path(folder) / "timeline.json"
        group = Group({**job, "timeline": str(timeline)}, ranks, args.launcher, HOROVOD_TIMELINE="DYNAMIC")
        try:
            group.do({"steps": 4})
            found: dict[str, Any] = {
                "steps": group.do({"steps": args.steps}), "hosts": group.hosts(), **group.facts[0]
            }  # fmt: skip
            if ranks == 1:
                found["layers"] = group.do({"steps": 5, "layers": True})[0]
            else:
                found["standalone"] = np.max(group.do({"standalone": 10}), axis=0).tolist()
                watched = group.do({"steps": args.steps, "timeline": True})
                found["backward_ended"] = [[step["ended"] for step in rank] for rank in watched]
                found["timeline"] = read_timeline(timeline)
        finally:
            group.close()
    return found


def median_parts(steps: list[list[dict[str, float]]]) -> dict[str, float]:
    """Median milliseconds over ranks and steps."""
    every = [step for rank in steps for step in rank]
    return {"step": 1e3 * float(np.median([sum(s[p] for p in PARTS) for s in every])),
            **{p: 1e3 * float(np.median([s[p] for s in every])) for p in (*PARTS, "cpu")}}  # fmt: skip


# --- Horovod's timeline -----------------------------------------------------------------------------------------------


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The events of a timeline, which Horovod leaves without its last bracket."""
    text = path.read_text().rstrip().rstrip(",").removesuffix("]").rstrip().rstrip(",")
    return json.loads(text + "]")


def spans(events: list[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """(tensor, activity, begin, end) in seconds since the epoch, in order of their begin."""
    named = {e["pid"]: e["args"] for e in events if e.get("name") == "process_name"}
    zero = next(
        a["start_time_since_epoch_in_micros"] for a in named.values() if "start_time_since_epoch_in_micros" in a
    )
    opened: dict[Any, list[tuple[str, float]]] = {}
    found = []
    for e in events:
        if e.get("ph") == "B":
            opened.setdefault(e["pid"], []).append((e["name"], (zero + e["ts"]) * 1e-6))
        elif e.get("ph") == "E" and opened.get(e["pid"]):
            what, begin = opened[e["pid"]].pop()
            found.append((named[e["pid"]].get("name", ""), what, begin, (zero + e["ts"]) * 1e-6))
    return sorted(found, key=lambda s: s[2])


def overlap(events: list[dict[str, Any]], backward_ended: list[list[float]], standalone: list[float]) -> dict[str, Any]:
    """Milliseconds of all-reduces per step: in all, after backward (exposed), stand-alone; medians over steps.

    `backward_ended` [rank][step] are seconds since the epoch. Every bucket is all-reduced once in each step, so its
    n-th time is that of the n-th step.
    """
    reduced: dict[str, list[tuple[float, float]]] = {}
    for name, what, begin, end in spans(events):
        if what == "ALLREDUCE" and ".gradients." in name:
            reduced.setdefault(name.removeprefix("allreduce."), []).append((begin, end))
    by_step = np.array(backward_ended).T
    wrong = {name: len(times) for name, times in reduced.items() if len(times) != len(by_step)}
    if wrong or not reduced:
        raise SystemExit(f"the timeline tells of {wrong or 'no'} all-reduces in {len(by_step)} steps")
    total, exposed, told = [], [], []
    for step, ended in enumerate(by_step.max(1).tolist()):
        mine = {name: times[step] for name, times in sorted(reduced.items())}
        total.append(sum(end - begin for begin, end in mine.values()))
        exposed.append(max(0.0, max(end for _, end in mine.values()) - ended))
        told.append([[n, round(1e3 * (b - ended), 2), round(1e3 * (e - ended), 2)] for n, (b, e) in mine.items()])
    alone = float(np.median(standalone))
    share = record.summary(np.array(exposed) / alone)
    return {
        "steps": len(total),
        "all-reduce ms": 1e3 * float(np.median(total)),
        "exposed ms": 1e3 * float(np.median(exposed)),
        "stand-alone ms": 1e3 * alone,
        "exposed / stand-alone": share["median"],
        "low": share["low"],
        "high": share["high"],
        "ranks apart ms": 1e3 * float(np.median(np.ptp(by_step, axis=1))),
        "exposed ms of every step": [round(1e3 * seconds, 2) for seconds in exposed],
        TOLD: told[:3],
    }


if __name__ == "__main__":
    main()
