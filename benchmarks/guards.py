"""`horovodrun -np 2 python -m benchmarks.guards`: what the guards of a run cost, as a share of its step.

Each guard is timed by itself, many times, in the process and at the place where it runs between two steps of ResNet-18
at 224 px, 32 images per rank, one thread; the step is timed in the same run. A difference of one in a hundred between
two whole runs would drown in the noise of the machine. Rank 0 writes the record; the times are its own.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import torch

from benchmarks import record, show
from dist_lars import api, engine
from dist_lars import comm as ranks
from dist_lars.cli import load_config
from dist_lars.guards import gradient_norm
from dist_lars.metrics import Counts
from dist_lars.plan import make_plan
from dist_lars.resources import pick_autocast
from dist_lars.supervisor import Supervisor
from dist_lars.watchdog import Watchdog

STEPS = 20
LIMIT = 1.0  # percent of a step that all guards together may take


def main() -> None:
    """Time steps and guards in turn, write the record."""
    torch.set_num_threads(1)
    comm = ranks.start(cpu=True)
    config = load_config(
        overrides={"batch_size": 32 * comm.size, "micro_batch": 32, "optim.lr": 0.1, "data.kind": "synthetic"}
    )
    plan, device = make_plan(config, comm.size, 100_000, 1), torch.device("cpu")
    torch.manual_seed(config.seed)  # replicas that start alike, or comparing them ends the job
    job = api.make_job(config, comm, plan, 1000, device, pick_autocast("auto", device))
    run_dir = Path(mkdtemp())
    supervisor = Supervisor(config, job, run_dir, 1000)
    watchdog = Watchdog(comm.rank, run_dir / "stacks.txt", None, print)
    counts, clock = Counts(device), engine.Clock()
    batch = torch.randint(0, 256, (32, 224, 224, 3), dtype=torch.uint8), torch.arange(32)

    def exchange() -> None:
        supervisor.note()
        supervisor.agreed()

    supervisor.agreed()
    guards: dict[str, tuple[Callable[[], object], float]] = {
        "gradient norm": (lambda: gradient_norm(job.model.parameters()), 1.0),
        "notes to other ranks, not overlapped": (exchange, 1.0),
        "watchdog": (lambda: watchdog.beat("x"), 1.0),
        "copy of the sums": (lambda: counts.sums.clone(), 1.0),
        "replicas compared": (lambda: supervisor.compare_replicas(1), 1 / config.guard.check_steps),
    }
    times: dict[str, list[float]] = {"step": [], **{name: [] for name in guards}}
    for step in range(5 + STEPS):
        took = {"step": record.clock(lambda: engine.train_step(job, iter([batch]), step, counts, clock))}  # noqa: B023
        took |= {name: record.clock(guard) for name, (guard, _) in guards.items()}
        if step >= 5:
            for name, seconds in took.items():
                times[name].append(seconds)
    if comm.rank == 0:
        tell(times, {name: share for name, (_, share) in guards.items()}, comm.size)
    comm.close()


def tell(times: dict[str, list[float]], per_step: dict[str, float], size: int) -> None:
    """One row per guard: milliseconds, how often, percent of the step."""
    step = record.summary(times["step"])["median"]
    rows = [
        {"what": name, "ms": 1e3 * record.summary(times[name])["median"], "per step": share,
         "percent of the step": 100 * share * record.summary(times[name])["median"] / step}
        for name, share in per_step.items()
    ]  # fmt: skip
    total = sum(float(row["percent of the step"]) for row in rows)
    rows += [{"what": "all guards", "ms": total * step * 10, "per step": 1.0, "percent of the step": total}]
    rows += [{"what": "the step", "ms": 1e3 * step, "per step": 1.0, "percent of the step": 100.0}]
    claims = [{"claim": f"all guards take at most {LIMIT:g} % of a step", "measured": total, "holds": total <= LIMIT}]
    print(show.markdown(rows), show.markdown(claims), sep="\n\n")
    print(record.write("guards", rows, times, claims=claims, ranks=size, model="resnet18", batch_per_rank=32))


if __name__ == "__main__":
    main()
