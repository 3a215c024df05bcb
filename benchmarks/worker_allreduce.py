"""All-reduces of chosen sizes by one carrier, on request, with their sums checked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from dist_lars import comm as ranks
from dist_lars.launchers import place_of

Reduce = Callable[[torch.Tensor], None]


def reduce_sizes(job: dict[str, Any], connection: Connection) -> None:
    """Answer {"elements", "repeat"} with the seconds of each all-reduce on this rank, until None comes."""
    from benchmarks.worker import Finished, facts

    torch.set_num_threads(1)
    rank, size, reduce = CARRIERS[job["carrier"]](job["device"] == "cpu")
    device = torch.device("cpu") if job["device"] == "cpu" else torch.device("cuda", torch.cuda.current_device())
    connection.send(facts(device))
    while (work := connection.recv()) is not None:
        flat = torch.arange(work["elements"], dtype=torch.float32, device=device).remainder_(1000).add_(rank)
        reduce(flat)
        expected = torch.arange(work["elements"], dtype=torch.float32, device=device).remainder_(1000)
        expected.mul_(size).add_(size * (size - 1) / 2)
        if not torch.equal(flat, expected):
            raise SystemExit(f"{job['carrier']}: the sum of {work['elements']} numbers is wrong")
        flat.zero_()
        connection.send([_clock(reduce, flat, device) for _ in range(work["repeat"])])
    raise Finished


def _clock(reduce: Reduce, flat: torch.Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    reduce(flat)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _comm(name: str, cpu: bool) -> ranks.Comm:
    place = place_of(os.environ)
    if not cpu and place:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    return ranks.start(cpu=cpu, backend=ranks.Backend(name))


def _horovod(cpu: bool) -> tuple[int, int, Reduce]:
    import horovod.torch as hvd

    comm = _comm("horovod", cpu)
    return comm.rank, comm.size, lambda flat: hvd.allreduce_(flat, name="flat", op=hvd.Sum)


def _torch(cpu: bool) -> tuple[int, int, Reduce]:
    import torch.distributed as dist

    comm = _comm("torch", cpu)
    return comm.rank, comm.size, lambda flat: dist.all_reduce(flat)


def _mpi(cpu: bool) -> tuple[int, int, Reduce]:
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # as our Horovod ranks have it
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    return world.rank, world.size, lambda flat: world.Allreduce(MPI.IN_PLACE, flat.numpy())


CARRIERS = {"horovod": _horovod, "horovod-gloo": _horovod, "torch": _torch, "mpi4py": _mpi}
