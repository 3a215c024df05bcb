"""`python -m dist_lars.doctor --cluster [options of train]`: every rank looks around before a run is started.

Started as the run will be (srun, mpirun, horovodrun), with any number of ranks on each node; DIST_LARS_RANKS says how
many were launched. Rank 0 prints a table of the nodes and a line per check. Ends soon after LIMIT seconds, whatever
hangs.

RUN_DIR/preflight.json holds the verdict; launchers change exit codes. Where it is absent the ranks never came together,
and another launcher may help.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from dist_lars import doctor_verdict as verdict
from dist_lars.cli import fail, is_first_process, make_parser, parse
from dist_lars.config import Config, data_path
from dist_lars.doctor_host import Check, as_json, check_decoder, check_torch
from dist_lars.doctor_reach import host_name
from dist_lars.doctor_roll import EXIT_APART, EXIT_SICK, IMPORTING, Deadline, Roll
from dist_lars.doctor_verdict import Facts, Link
from dist_lars.errors import UserError
from dist_lars.launchers import place_of

LIMIT = 45.0  # seconds
ALLREDUCE = 64 << 20  # bytes, a model's gradients
OPEN, PROBE, EXCHANGE = 4 << 10, 2 << 20, 16 << 20  # bytes between two neighbours of the ring
SLOW_PROBE = 0.2  # seconds
REDUCE_SECONDS, RING_SECONDS = 5.0, 10.0  # after which no further one is begun


def main(argv: list[str]) -> int:
    """Examine the ranks of this job; the exit code is the same on all of them."""
    try:
        config, extra = parse(argv, _parser())
        place = place_of(os.environ)
    except UserError as e:
        fail(e)
    try:
        roll = Roll(Path(config.run_dir) if config.run_dir else None, place.rank if place else 0)
    except OSError as e:
        leave(f"error: {host_name()} cannot write to run directory {config.run_dir}: {e.strerror}", EXIT_SICK)
    try:
        data_path(config)
    except UserError as e:
        roll.conclude([Check("data", "FAIL", str(e))])
        fail(e)
    with Deadline(roll, extra["limit"]):
        return examine(config, roll, extra["json"])


def _parser() -> Any:
    parser = make_parser("python -m dist_lars.doctor --cluster", __doc__ or "")
    parser.add_argument("--json", action="store_true", help="print a list of checks as JSON")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds until a rank that hangs is named")
    return parser


def report(table: str, checks: Sequence[Check]) -> str:
    """The table of nodes and the checks as text."""
    from dist_lars.doctor import table as lines

    return f"{table}\n{lines(list(checks))}"


def examine(config: Config, roll: Roll, json: bool = False, clock: Callable[[], float] = time.time,
            change: Callable[[Facts], Facts] = lambda facts: facts) -> int:  # fmt: skip
    """Join the ranks, let rank 0 tell what was found; `clock` and `change` are for tests: nodes that differ."""
    roll.at(IMPORTING)
    check_alone(roll)
    from dist_lars.api import start_ranks

    roll.at("joining the other ranks")
    try:
        comm = start_ranks(config)
    except UserError as e:
        leave(f"error: {e}" * is_first_process(), EXIT_APART)
    try:
        checks, table = compare(config, comm, roll, clock, change)
    except Exception as e:  # whatever is wrong here, the others must not wait for this rank
        text = f"rank {comm.rank} on {host_name()} failed while {roll.stage}: {type(e).__name__}: {e}"
        roll.conclude([verdict.fail("progress", text, verdict.exclude([host_name()]))])
        leave(f"error: {text}", EXIT_SICK)
    if comm.rank == 0:
        print(as_json(checks) if json else report(table, checks), flush=True)
        roll.conclude(checks)
    comm.barrier()  # launchers kill everyone at the first exit: rank 0 speaks before
    comm.close()
    return EXIT_SICK if any(c.status == "FAIL" for c in checks) else 0


def compare(config: Config, comm: Any, roll: Roll, clock: Callable[[], float],
            change: Callable[[Facts], Facts]) -> tuple[list[Check], str]:  # fmt: skip
    """(checks, table of the nodes), the same on all ranks."""
    from dist_lars.doctor_node import collect
    from dist_lars.resources import pick_device

    roll.at("looking around")
    device = pick_device(config.device, comm.local_rank)
    own = change(collect(comm, config, device, roll.run_dir))
    roll.at("comparing nodes")
    facts = comm.gather(own, "facts")
    joined = Check("ranks", "ok", f"{comm.size} launched, {comm.size} joined")
    checks = [joined, *verdict.judge(facts, config.device == "cpu")]
    roll.at("looking for the run directory of rank 0")
    checks.append(shared_run_dir(comm, facts, roll))
    roll.at("comparing clocks")
    checks.append(verdict.check_clocks(clock_offsets(comm, facts, clock)))
    roll.at(f"reducing {ALLREDUCE >> 20} MB over all ranks")
    checks.append(verdict.check_allreduce(allreduce_seconds(comm, device), comm.size, ALLREDUCE))
    roll.at("exchanging data between neighbours")
    checks.append(verdict.check_ring(ring(comm, facts, device), len(verdict.nodes(facts))))
    return checks, verdict.node_table(facts)


def check_alone(roll: Roll) -> None:
    """What must be right before Horovod is loaded: on the wrong processor that alone may end the process."""
    from dist_lars.doctor import check_build

    for look in (check_build, check_torch, check_decoder):  # one by one, for the decoder may end the process likewise
        check = look()
        if check.status == "FAIL":
            roll.conclude([check])
            line = f"{check.name}: {check.value}\n  -> {check.fix}, or {verdict.exclude([host_name()])}"
            leave(f"error: {host_name()} cannot train: {line}", EXIT_SICK)


def leave(text: str, code: int) -> NoReturn:
    """Say it, if there is a word, and end this rank; launchers kill all at the first exit: let others speak, too."""
    print(text, end="\n" * bool(text), file=sys.stderr, flush=True)
    time.sleep(1)
    os._exit(code)


def shared_run_dir(comm: Any, facts: Sequence[Facts], roll: Roll) -> Check:
    """Whether every node sees the files that rank 0 writes: checkpoints are read by all."""
    if roll.folder is None:
        return Check("run directory", "ok", "none named (--run_dir)")
    comm.barrier()
    seen = comm.gather((roll.folder / "rank0").exists(), "run directory")
    blind = [f.host for f, sees in zip(facts, seen, strict=True) if not sees]
    if blind:
        value = f"{roll.run_dir}: files of rank 0 are not visible on {verdict.some(blind)}"
        return verdict.fail(
            "run directory", value, "a --run_dir (RUN_DIR of the templates) on a file system that all nodes share"
        )
    return Check("run directory", "ok", f"{roll.run_dir}, shared by all nodes")


def clock_offsets(comm: Any, facts: Sequence[Facts], clock: Callable[[], float], rounds: int = 5) -> dict[str, float]:
    """{host: seconds from the median of all ranks}, the median of several rounds right after a barrier."""
    table = []
    for n in range(rounds):
        comm.barrier()
        table.append(comm.gather(clock(), f"clock {n}"))
    offsets = [median(times[r] - median(times) for times in table) for r in range(comm.size)]
    return {f.host: offset for f, offset in zip(facts, offsets, strict=True)}


def allreduce_seconds(comm: Any, device: Any, repeats: int = 3) -> list[float]:
    """Seconds of the slowest rank for all-reduces of ALLREDUCE bytes, after one to warm up; fewer on a slow network."""
    import torch

    flat = torch.ones(ALLREDUCE // 4, device=device)
    found: list[float] = []
    while comm.size > 1 and len(found) <= repeats and sum(found) < REDUCE_SECONDS:
        comm.barrier()
        began = time.monotonic()
        comm.average_(flat, "doctor")
        _wait(device)
        found.append(max(comm.gather(time.monotonic() - began, "all-reduce")))
    return found[1:] or found


def ring(comm: Any, facts: Sequence[Facts], device: Any) -> list[Link]:
    """What the first ranks of neighbouring nodes can exchange, one pair after the other, for RING_SECONDS at most."""
    import torch

    leads = [own[0] for own in verdict.nodes(facts).values()]
    pairs = list(zip(leads, leads[1:], strict=False)) + ([(leads[-1], leads[0])] if len(leads) > 2 else [])
    links: list[Link] = []
    spent = 0.0
    for a, b in pairs:
        if spent > RING_SECONDS:
            break
        other = {a.rank: b.rank, b.rank: a.rank}.get(comm.rank)
        for size in (OPEN, PROBE, EXCHANGE):  # the first opens the connection; the second is enough where it takes long
            flat = torch.zeros(size // 4 if other is not None else 0, device=device)
            comm.barrier()
            began = time.monotonic()
            comm.swap(flat, other, f"link {a.rank} {b.rank} {size}")
            _wait(device)
            times = comm.gather(time.monotonic() - began, f"link {size}")
            seconds = max(times[a.rank], times[b.rank])  # the same number on all ranks: they go on and stop together
            spent += seconds
            if size == PROBE and seconds > SLOW_PROBE:
                break
        links.append(Link(a.host, b.host, size / seconds))
    return links


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
