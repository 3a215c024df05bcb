"""Images/s and efficiency over numbers of ranks, and where the time of a step goes.

    python -m benchmarks.scaling --ranks 1,2,4 --model resnet18 --mode weak
    python -m benchmarks.scaling --compare before.json after.json

Ranks are started by srun inside an allocation, else by mpirun, on this host or those of `--hosts`, and train through
the trainer's own engine. All groups live side by side and take turns of a few steps, so that every number of one round
was taken within seconds of the others; ratios are taken round by round. Groups that wait for their turn are stopped
where they run on this host; on others their background threads go on, which costs the one that works some CPU. Ranks
get one thread each unless OMP_NUM_THREADS says more.
Definitions:

- The slowest rank is the step. images/s = images of all ranks / sum of these steps, round by round and without warm-up;
  the median over rounds.
- Of 1 rank: images/s(N) / (N x images/s(1)); of 1 node: images/s per rank over that of the same case on one host,
  with the most of the measured `--ranks` that one host held. Both are efficiencies where scaling is weak, `--batch`
  images per rank and pass; where it is strong, `--batch` images over all ranks, the batch of a rank shrinks, too.
- Of ceiling: against N independent trainings at the same time on the same cores, their images/s added up. What a
  machine loses by sharing memory and power is lost there, too; what is missing to it is communication, and waiting for
  the slower rank. In step: against the same trainings if they had waited for each other after every step. Total: the
  ratio of images/s over all rounds together, where a straggler counts for as long as it lasted.
- Of DDP: against torch's DistributedDataParallel in the same loop.
- Over ceiling: the step minus that of the independent ranks, round by round: all that communication costs, also where
  it slows backward down, and waiting for the slower rank. `wait` is what comes after backward. `ranks apart`: how much
  longer than the mean the slowest rank works at a step, of itself: what waiting for each other costs on a machine that
  is not equally fast everywhere.
- Parts of a step: `data` is waiting for a batch, `input` copying and normalising it, `forward` the model and the loss,
  `rest` all between the parts. `cpu`: of all threads of a rank, also those that carry gradients.
- Carrier `none`: one rank alone, or independent ones. A case is ranks, carrier, wire, passes and data.
- Beyond: milliseconds of a rank's step, on average over ranks, less those of an independent rank, or of DDP's, in the
  same round. DDP waits inside backward, Horovod in `wait`, each for the slower rank, too.
- Intervals: bootstrap of the median over rounds, 95 %; none below six rounds. max/median, p99/median: the slowest step
  and, from a hundred steps on, their 99th percentile, over their median.
- Hours: of all epochs of the recipe at this speed, without evaluation, where images are of the recipe's size; with
  synthetic images, if reading and decoding keep up. Node-hours: times the hosts of the case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, show
from benchmarks.group import Group, close_all, count, described, in_turn, launch_options, option, slots
from benchmarks.scaling_results import (
    PARTS,
    Case,
    Measured,
    beyond_rows,
    compare,
    recipe,
    shown,
    shown_beyond,
    shown_split,
    split_rows,
    table,
)
from dist_lars.cli import preset_names

CARRIERS = {"horovod": None, "horovod-gloo": "gloo", "torch": None, "ddp": None}  # -> launcher it needs


def make_cases(ranks: Sequence[int], carriers: Sequence[str], wires: Sequence[str], passes: Sequence[int],
               real: bool) -> list[Case]:  # fmt: skip
    """Every number of ranks with every carrier; then, for the first carrier at the most ranks, one thing at a time.

    One rank alone has nothing to carry.
    """
    many = max(ranks)
    found = [Case(1, "none")]
    for n in sorted(set(ranks) - {1}):
        found += [Case(n, "none"), *(Case(n, carrier) for carrier in carriers)]
    if many > 1:
        found += [Case(many, carriers[0], wire=wire) for wire in wires if wire != "fp32"]
        for p in passes:
            if p != 1:
                found += [Case(many, "none", passes=p), Case(many, carriers[0], passes=p)]
    if real:
        found += [Case(1, "none", data="real"), Case(many, "none", data="real")]
        found += [Case(many, carriers[0], data="real")] if many > 1 else []
    return list(dict.fromkeys(found))


def main() -> None:
    """Measure and record, or compare two records."""
    args = parse()
    if args.compare:
        print(show.markdown(compare(*(json.loads(p.read_text()) for p in args.compare))))
        return
    cases = make_cases(args.ranks, args.carriers, args.wire, args.accumulation, args.images is not None)
    groups: dict[str, Group] = {}
    measured = {case.key(): Measured(case, batch_of(args, case)) for case in cases}
    try:
        for case in cases:
            print(f"starting {case.key()} ...", flush=True)
            groups[case.key()] = start_group(args, case)
            if len(groups) == 1:
                warm_up(groups[case.key()], {"steps": 1, "apart": True}, most=1)
                check_memory(groups[case.key()], cases[1:], slots(args.launcher, args.hosts))
        turns, unsteady = measure(groups, measured, args)
        largest = groups[max(cases, key=lambda c: (c.carrier == args.carriers[0], c.ranks)).key()]
        facts, machines = largest.facts[0], largest.machines()
        hosts = {f"{case.ranks} ranks": groups[case.key()].hosts() for case in cases if case.passes == 1}
    finally:
        close_all(list(groups.values()))
    rows, split, beyond = table(measured, args, hosts), split_rows(measured), beyond_rows(measured)
    tables = report(rows, split, beyond, turns, args.steps, unsteady)
    print(tables)
    raw = {f"{key} rank {r}": seconds for key, m in measured.items() for r, seconds in m.raw().items()}
    path = record.write(
        args.name or f"scaling_{args.model}", rows, raw, model=args.model, mode=args.mode, batch=args.batch,
        image_size=args.image_size, rounds=turns, steps_per_round=args.steps, still_warming_up=unsteady,
        ranks_per_host=hosts, hosts=machines, **described(facts), launcher=args.launcher, options=args.option,
        recipe=recipe(args), split=split, beyond=beyond,
    )  # fmt: skip
    path.with_suffix(".md").write_text(f"`{record.command()}`\n\n{tables}", encoding="utf-8")
    draw(rows, path.with_suffix(".png"), args)
    print(f"wrote {path.name}, its .md and its .png to benchmarks/records")


def report(rows: list[dict[str, Any]], split: list[dict[str, Any]], beyond: list[dict[str, Any]], turns: int,
           steps: int, unsteady: list[str]) -> str:  # fmt: skip
    """What is printed, and kept as .md."""
    began = f"; not steady when they began: {', '.join(unsteady)}" if unsteady else ""
    return (
        f"{show.markdown(shown(rows))}\n\n{turns} rounds of {steps} step{'s' * (steps > 1)}{began}.\n\n"
        f"Median milliseconds of a step:\n\n{show.markdown(shown_split(split))}\n\n"
        f"What a rank spends beyond others, by part:\n\n{show.markdown(shown_beyond(beyond))}\n\n{definitions()}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = _list(count)
    parser.add_argument("--ranks", type=numbers, default=[1, 2], help="e.g. 1,2,4")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--mode", choices=("weak", "strong"), default="weak")
    parser.add_argument("--batch", type=count, default=32, help="images per pass: of a rank (weak), of all (strong)")
    parser.add_argument("--image_size", type=count, default=224)
    parser.add_argument("--carriers", type=_list(str, CARRIERS), default=["horovod", "ddp"], help=", ".join(CARRIERS))
    parser.add_argument("--wire", type=_list(str, ("fp32", "fp16", "bf16")), default=["fp32"], help="e.g. fp16,bf16")
    parser.add_argument("--accumulation", type=numbers, default=[1], help="passes per step, e.g. 1,4,16")
    parser.add_argument("--images", type=Path, help="also train on the images of this folder or these shards")
    parser.add_argument("--steps", type=count, default=3, help="of one turn")
    parser.add_argument("--seconds", type=float, default=300, help="for all turns together, six at least")
    parser.add_argument("--rounds", type=count, default=1000, help="turns of each group at most")
    parser.add_argument(
        "--option", type=option, action="append", default=[], metavar="KEY=VALUE", help="of dist_lars.train"
    )
    launch_options(parser)
    parser.add_argument(
        "--recipe",
        choices=preset_names(),
        metavar="PRESET",
        help="preset whose epochs are turned into hours (default: by model)",
    )
    parser.add_argument("--name", help="of the record")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="RECORD", help="two records: what the second one changed"
    )
    args = parser.parse_args()
    for path in args.compare or []:
        if not path.is_file():
            parser.error(f"--compare {path}: there is no such file")
    if args.images and not args.images.is_dir():
        parser.error(f"--images {args.images}: there is no such folder")
    if args.launcher == "srun" and "horovod-gloo" in args.carriers:
        parser.error(
            "horovod-gloo is started by horovodrun, which knows no allocation: add --launcher horovodrun --hosts"
        )
    if args.carriers[0] == "ddp" and set(args.wire) != {"fp32"}:
        parser.error(
            "--wire is for the first of the carriers, and ddp sends gradients as they are: put another one first, "
            "as in --carriers horovod,ddp"
        )
    return args


def definitions() -> str:
    """What the words of the tables mean."""
    return str(__doc__).partition("Definitions:\n\n")[2]


def _list(kind: Callable[[str], Any], allowed: Any = None) -> Callable[[str], list[Any]]:
    def split(text: str) -> list[Any]:
        values = [kind(word) for word in text.split(",")]
        wrong = [v for v in values if allowed is not None and v not in allowed]
        if wrong or not values:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed)}")
        return values

    return split


def batch_of(args: argparse.Namespace, case: Case) -> int:
    """Images of one pass on one rank."""
    if args.mode == "weak":
        return args.batch
    if args.batch % case.ranks:
        raise SystemExit(f"strong scaling: --batch {args.batch} does not divide by {case.ranks} ranks")
    return args.batch // case.ranks


def start_group(args: argparse.Namespace, case: Case) -> Group:
    """The ranks of a case, ready for their first turn."""
    options = dict(item.split("=", 1) for item in args.option)
    resize = {"data.image_size": args.image_size, "data.resize": max(args.image_size * 8 // 7, args.image_size)}
    job = {
        "task": "train", "carrier": case.carrier, "model": args.model, "batch": batch_of(args, case),
        "accumulation": case.passes, "wire": case.wire, "options": {**resize, **options},
        "images": str(args.images.resolve()) if case.data == "real" else None,
    }  # fmt: skip
    launcher = CARRIERS.get(case.carrier) or args.launcher
    return Group(job, case.ranks, launcher, args.hosts)


def check_memory(one: Group, more: Sequence[Case], slots: int) -> None:
    """Refuse what would not fit: all groups live side by side. `one` has trained; `more` are to come.

    A host holds up to `slots` ranks of a group, a GPU one of each.
    """
    (seen,) = one.do({"memory": True})
    count = len(more) if one.facts[0]["device"] == "cuda" else sum(min(case.ranks, slots) for case in more)
    if count * seen["held"] > seen["free"]:
        raise SystemExit(
            f"{count} more ranks of {seen['held'] / 1e9:.1f} GB each do not fit into the {seen['free'] / 1e9:.1f} GB "
            f"that are free: measure fewer cases in one run, or take a smaller --batch"
        )


def measure(groups: dict[str, Group], measured: dict[str, Measured], args: argparse.Namespace) -> tuple[int, list[str]]:
    """Warm every group up, then take turns; how many rounds, and which groups were not steady when they began."""
    cuda = next(iter(groups.values())).facts[0]["device"] == "cuda"

    def work(key: str) -> dict[str, Any]:
        steps = max(1, round(args.steps / measured[key].case.passes))
        return {"steps": steps, "apart": not cuda}

    unsteady = [key for key, group in groups.items() if not warm_up(group, work(key))]
    end = time.monotonic() + args.seconds
    done = in_turn(
        groups, work, args.rounds, lambda key, answer: measured[key].add(answer), lambda: time.monotonic() > end
    )
    if cuda:  # the parts need a device that is waited for, which costs: extra turns tell them
        in_turn(
            groups, lambda key: {**work(key), "apart": True}, 3,
            lambda key, answer: measured[key].add(answer, apart=True), lambda: False,
        )  # fmt: skip
    return done, unsteady


def warm_up(group: Group, work: dict[str, Any], most: int = 8) -> bool:
    """Turns until one is within 5 % of the one before; whether `most` were enough."""
    last = float("inf")
    for _ in range(most):
        now = max(sum(sum(step[p] for p in PARTS) for step in steps) for steps in group.do(work))
        if abs(now - last) < 0.05 * now:
            return True
        last = now
    return False


def draw(rows: list[dict[str, Any]], path: Path, args: argparse.Namespace) -> None:
    """Images/s and efficiency over ranks, a line per carrier; a bar per case where something else varies, too."""
    title = (
        f"{args.model}, {args.batch} images of {args.image_size} px "
        f"{'per rank' if args.mode == 'weak' else 'over all ranks'}"
    )
    rows = [{**r, "who": "ceiling" if r["carrier"] == "none" else r["carrier"]} for r in rows]
    if varied := [what for what in ("data", "wire", "passes") if len({r[what] for r in rows}) > 1]:
        for r in rows:
            words = [f"{r[what]} pass{'es' * (r[what] > 1)}" if what == "passes" else r[what] for what in varied]
            r["case"] = "\n".join([f"{r['ranks']} rank{'s' * (r['ranks'] > 1)}", *words])
        show.plot(rows, path, x="case", y="images/s", series="who", title=title)
        return
    one = next(r for r in rows if r["ranks"] == 1)
    ideal = [{"who": "1 rank x N", "ranks": n, "images/s": n * one["images/s"], "line": ":"}
             for n in sorted({r["ranks"] for r in rows})]  # fmt: skip
    carriers = dict.fromkeys(r["who"] for r in rows if r["who"] != "ceiling")
    points = [*ideal, *rows, *({**one, "who": who} for who in carriers)]
    points.sort(key=lambda p: p["ranks"])
    name = "of 1 rank"
    share = [
        {name: p["images/s"] / p["ranks"] / one["images/s"], **p, "low": p.get(f"{name} low"),
         "high": p.get(f"{name} high")}
        for p in points
    ]  # fmt: skip
    how = {"x": "ranks", "series": "who", "kind": "line"}
    show.plots(path, (points, {**how, "y": "images/s", "title": title}), (share, {**how, "y": name}))


if __name__ == "__main__":
    main()
