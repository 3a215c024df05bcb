"""Latency and bus bandwidth of all-reduces over message sizes, by everything that can carry them.

    python -m benchmarks.allreduce --ranks 2

Carriers: Horovod under its MPI and its Gloo controller, torch.distributed (gloo; NCCL with --device cuda), and MPI
itself through mpi4py. Each adds known numbers and checks every sum before it is timed. All are started once and take
turns, size by size. Seconds are those of the slowest rank; bus bandwidth is 2 (p - 1) / p x bytes / seconds, what each
rank sends and receives in the best algorithm. The fit `seconds = a + bytes / b`, by least squares on the relative
error, is kept in the record for predictions.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks import record, show
from benchmarks.group import Group, close_all, count, launch_options

LAUNCHER = {"horovod-gloo": "gloo"}
CARRIERS = ("horovod", "horovod-gloo", "torch", "mpi4py")


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument("--carriers", default=None, help=f"of {', '.join(CARRIERS)} (default: all that run there)")
    parser.add_argument("--largest_mb", type=float, default=256.0)
    parser.add_argument("--rounds", type=count, default=5, help="turns of each carrier at each size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    launch_options(parser)
    parser.add_argument("--name", default="allreduce", help="of the record")
    args = parser.parse_args()
    known = [c for c in CARRIERS if args.device == "cpu" or c in ("horovod", "torch")]
    if args.launcher == "srun":  # horovodrun, which horovod-gloo needs, knows no allocation
        known = [c for c in known if c not in LAUNCHER]
    carriers = args.carriers.split(",") if args.carriers else known
    if set(carriers) - set(known):
        parser.error(f"--carriers {args.carriers}: choose from {', '.join(known)}")
    times, hosts = measure(args, carriers)
    rows, fits = table(times, args.ranks), fit_all(times)
    print(show.markdown(rows), show.markdown(fits), sep="\n\n")
    raw = {f"{carrier} {size}": values for (carrier, size), values in times.items()}
    path = record.write(args.name, rows, raw, ranks=args.ranks, ranks_per_host=hosts, device=args.device,
                        launcher=args.launcher, fits=fits)  # fmt: skip
    show.plot(rows, path.with_suffix(".png"), x="MB", y="bus GB/s", series="carrier", kind="line",
              title=f"All-reduce of {args.ranks} ranks", logx=True)  # fmt: skip
    print(f"wrote {path.name} and its .png to benchmarks/records")


def sizes(largest_mb: float) -> list[int]:
    """4 bytes to the largest, each 8 times the one before."""
    found = [4]
    while found[-1] * 8 <= largest_mb * 1e6:
        found.append(found[-1] * 8)
    return found


def measure(args: argparse.Namespace, carriers: list[str]) -> tuple[dict[tuple[str, int], list[float]], list[int]]:
    """{(carrier, bytes): seconds of every all-reduce, of the slowest rank}, and the ranks of each host."""
    groups: dict[str, Group] = {}
    times: dict[tuple[str, int], list[float]] = {}
    try:
        for carrier in carriers:
            job = {"task": "allreduce", "carrier": carrier, "device": args.device}
            groups[carrier] = Group(job, args.ranks, LAUNCHER.get(carrier, args.launcher), args.hosts)
        for size in sizes(args.largest_mb):
            repeat = int(np.clip(2e7 / size, 2, 50))
            for turn in range(args.rounds + 1):
                for carrier, group in groups.items():
                    answers = group.do({"elements": size // 4, "repeat": repeat})
                    if turn:  # the first one warms up
                        times.setdefault((carrier, size), []).extend(np.max(answers, axis=0).tolist())
            print(f"{size:>11,} bytes: " + ", ".join(f"{c} {1e3 * np.median(times[c, size]):.3f} ms" for c in carriers),
                  flush=True)  # fmt: skip
        return times, groups[carriers[0]].hosts()
    finally:
        close_all(list(groups.values()))


def table(times: dict[tuple[str, int], list[float]], ranks: int) -> list[dict[str, Any]]:
    """One row per size and carrier."""
    rows = []
    for (carrier, size), values in sorted(times.items(), key=lambda item: item[0][1]):
        seen = record.summary(values)
        bus = 2e-9 * (ranks - 1) / ranks * size
        rows.append(
            {
                "MB": size / 1e6, "carrier": carrier, "ms": 1e3 * seen["median"], "ms p10": 1e3 * seen["p10"],
                "ms p90": 1e3 * seen["p90"], "bus GB/s": bus / seen["median"], "low": bus / seen["high"],
                "high": bus / seen["low"],
            }
        )  # fmt: skip
    return rows


def fit_all(times: dict[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    """`fit` for every carrier; no bandwidth where larger messages took no longer."""
    rows: list[dict[str, Any]] = []
    for carrier in dict.fromkeys(c for c, _ in times):
        points = [(size, float(np.median(values))) for (c, size), values in times.items() if c == carrier]
        a, b = fit([p[0] for p in points], [p[1] for p in points])
        errors = [abs((a + size / b) / seconds - 1) for size, seconds in points]
        row: dict[str, Any] = {"carrier": carrier, "latency us": 1e6 * a, "GB/s": 1e-9 * b if np.isfinite(b) else None}
        row["largest error %"] = 100 * max(errors)
        rows.append(row)
    return rows


def fit(size: list[int], seconds: list[float]) -> tuple[float, float]:
    """(a in seconds, b in bytes/s) of seconds = a + size / b, every point weighted by 1 / seconds."""
    t = np.array(seconds)
    design = np.stack([1 / t, np.array(size) / t], axis=1)
    from scipy.optimize import nnls  # neither a latency nor a bandwidth is negative

    (a, per_byte), _ = nnls(design, np.ones(len(t)))
    return float(a), float(1 / per_byte) if per_byte else float("inf")


if __name__ == "__main__":
    main()
