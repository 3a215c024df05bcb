"""One training step taken apart: its parts, every layer, and what of the communication hides behind backward.

    python -m benchmarks.step --model resnet18 --ranks 2

1. The parts of a step, of one rank alone and of `--ranks` ranks by Horovod, in turns of two steps; `x alone` is how
   much longer the latter takes, round by round.
2. Every layer: milliseconds forward and backward, parameters, one rank (for predictions of larger machines), and what
   of both falls to no layer, such as the loss: together they are the step's `forward` and `backward`.
3. Overlap, from Horovod's own timeline (HOROVOD_TIMELINE) of rank 0: when the all-reduce of each bucket ran. What is
   not through when the last rank's backward ends is exposed; until then the others wait for that rank (`ranks apart`),
   which no network could change. Beside it the same buckets with nothing else to do (stand-alone). Hosts' clocks are
   compared: over several hosts they must agree to a millisecond.

Ranks get one thread each unless OMP_NUM_THREADS says more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record, show
from benchmarks.group import LEAST, Group, close_all, count, described, in_turn, launch_options, option
from benchmarks.scaling import warm_up
from benchmarks.scaling_results import PARTS, Case, Measured, ratio

TOLD = "ms from the last rank's end of backward"  # [bucket, begin, end] of the first steps


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument("--batch", type=count, default=32, help="images per rank and pass")
    parser.add_argument("--image_size", type=count, default=224)
    parser.add_argument("--steps", type=count, default=12, help="of each kind")
    parser.add_argument(
        "--option", type=option, action="append", default=[], metavar="KEY=VALUE", help="of dist_lars.train"
    )
    launch_options(parser)
    parser.add_argument("--name", help="of the record")
    args = parser.parse_args()
    sizes = {"1 rank alone": (1, "none")}
    if args.ranks > 1:
        sizes[f"{args.ranks} ranks, Horovod"] = args.ranks, "horovod"
    groups: dict[str, Group] = {}
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        timeline = Path(folder) / "timeline.json"
        try:
            for name, (ranks, carrier) in sizes.items():
                groups[name] = start(args, ranks, carrier, timeline)
            measured, steps, extra["still_warming_up"] = in_turns(groups, args.steps)
            alone, *others = groups.values()
            layers = alone.do({"steps": 5, "layers": True})[0]
            for many in others:
                extra |= {"overlap": watch(many, args.steps, timeline), "ranks_per_host": many.hosts()}
                print(show.markdown([{k: v for k, v in extra["overlap"].items() if not isinstance(v, list)}]))
            facts = [*others, alone][0].facts[0]
        finally:
            close_all(list(groups.values()))
    rows: list[dict[str, Any]] = [{"case": name, **median_parts(every)} for name, every in steps.items()]
    seconds = [m.seconds() for m in measured.values()]
    for row, other in zip(rows[1:], seconds[1:], strict=True):
        row |= ratio("x alone", other, seconds[0])
    raw = {f"{name}, rank {r}": times for name, m in measured.items() for r, times in m.raw().items()}
    print(show.markdown(rows))
    print(show.markdown(sorted(layers, key=lambda r: -r["backward ms"])[:10]))
    name = args.name or f"step_{args.model}"
    path = record.write(name, rows, raw, model=args.model, batch=args.batch, image_size=args.image_size,
                        ranks=args.ranks, launcher=args.launcher, options=args.option,
                        **described(facts), layers=layers, **extra)  # fmt: skip
    print(f"wrote {path.name} to benchmarks/records")


def start(args: argparse.Namespace, ranks: int, carrier: str, timeline: Path) -> Group:
    """A training, ready for its first turn."""
    options = dict(item.split("=", 1) for item in args.option)
    options |= {"data.image_size": args.image_size, "data.resize": args.image_size * 8 // 7}
    job = {"task": "train", "carrier": carrier, "model": args.model, "batch": args.batch, "accumulation": 1,
           "wire": "fp32", "options": options, "timeline": str(timeline)}  # fmt: skip
    return Group(job, ranks, args.launcher, args.hosts, HOROVOD_TIMELINE="DYNAMIC")


def in_turns(
    groups: dict[str, Group], steps: int
) -> tuple[dict[str, Measured], dict[str, list[list[dict[str, float]]]], list[str]]:
    """Times by round and steps by rank of every group, `steps` of each in turns of two, and which were not steady."""
    work = {"steps": min(2, steps)}
    measured = {name: Measured(Case(g.ranks, "none" if g.ranks == 1 else "horovod"), 1) for name, g in groups.items()}
    every: dict[str, list[list[dict[str, float]]]] = {name: [[] for _ in range(g.ranks)] for name, g in groups.items()}

    def done(name: str, answers: list[list[dict[str, float]]]) -> None:
        measured[name].add(answers)
        for mine, more in zip(every[name], answers, strict=True):
            mine += more

    unsteady = [name for name, group in groups.items() if not warm_up(group, work)]
    in_turn(groups, lambda _: work, -(-steps // work["steps"]), done, lambda: False)
    return measured, every, unsteady


def watch(group: Group, steps: int, timeline: Path) -> dict[str, Any]:
    """The overlap of `steps` steps; the stand-alone all-reduces are timed before and after them."""
    before = np.max(group.do({"standalone": 5}), axis=0)
    watched = group.do({"steps": steps, "timeline": True})
    events = read_timeline(timeline)
    after = np.max(group.do({"standalone": 5}), axis=0)
    ended = [[step["ended"] for step in rank] for rank in watched]
    return overlap(events, ended, [*before.tolist(), *after.tolist()])


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
    low, high = ratio_of_medians(exposed, standalone)
    return {
        "steps": len(total),
        "all-reduce ms": 1e3 * float(np.median(total)),
        "exposed ms": 1e3 * float(np.median(exposed)),
        "stand-alone ms": 1e3 * alone,
        "exposed / stand-alone": float(np.median(exposed)) / alone,
        "low": low,
        "high": high,
        "ranks apart ms": 1e3 * float(np.median(np.ptp(by_step, axis=1))),
        "exposed ms of every step": [round(1e3 * seconds, 2) for seconds in exposed],
        TOLD: told[:3],
    }


def ratio_of_medians(values: list[float], base: list[float]) -> tuple[float | None, float | None]:
    """The bootstrap 95 % interval of median(values) / median(base), both drawn anew; nothing from too few."""
    if min(len(values), len(base)) < LEAST:
        return None, None
    random = np.random.default_rng(0)
    above, below = (np.median(random.choice(of, (2000, len(of))), axis=1) for of in (values, base))
    low, high = np.percentile(above / below, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
