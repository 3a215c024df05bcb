"""Ranks that talk through torch.distributed: gloo for what lies in the host's memory, NCCL for what lies on GPUs."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from dist_lars.comm import mpi
from dist_lars.errors import UserError
from dist_lars.launchers import Place, host_names
from dist_lars.reducer import Reducer

MEETING = 300.0  # seconds within which all ranks must have started


class TorchComm:
    """The ranks that torchrun, mpirun or srun started. `seconds` is how long one waits for another in a collective."""

    def __init__(self, place: Place, *, cpu: bool, seconds: float) -> None:
        self.rank, self.size, self.local_rank, self.local_size = place[1:]
        self.mpi = place.launcher == "mpirun" and "MASTER_ADDR" not in os.environ
        store = meet(place)
        store.set_timeout(timedelta(seconds=seconds))
        dist.init_process_group(
            "gloo" if cpu else "cpu:gloo,cuda:nccl",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=seconds),
        )

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        flat = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        dist.all_reduce(flat)
        return dict(zip(values, flat.tolist(), strict=True))

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        flat = torch.tensor(values, dtype=torch.int32)
        work = dist.all_reduce(flat, async_op=True)

        def sums() -> list[int]:
            work.wait()
            return flat.tolist()

        return sums

    def average_(self, flat: torch.Tensor, name: str) -> None:
        if flat.numel():
            dist.all_reduce(flat)
            flat.div_(self.size)

    def broadcast_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for tensor in tensors.values():  # through a contiguous copy: it refuses channels-last
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)

    def gather(self, value: Any, name: str) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any, name: str) -> Any:
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        self.sum({"barrier": 0.0})

    def swap(self, flat: torch.Tensor, other: int | None, name: str) -> None:
        if other is not None:
            works = [dist.P2POp(dist.isend, flat, other), dist.P2POp(dist.irecv, torch.empty_like(flat), other)]
            for work in dist.batch_isend_irecv(works):
                work.wait()

    def carrier(self) -> str:
        return f"torch.distributed by {dist.get_backend().upper()}"

    def reducer(
        self, parameters: Iterable[nn.Parameter], bucket_mb: float, wire: torch.dtype | None = None
    ) -> Reducer | None:
        def start(flat: torch.Tensor, name: str) -> Any:
            return dist.all_reduce(flat, async_op=True)

        return Reducer(parameters, start, _wait, self.size, bucket_mb, wire) if self.size > 1 else None

    def abort(self) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        if self.mpi:
            mpi.abort()
        os._exit(1)  # torchrun, or srun --kill-on-bad-exit, ends the others; their connections break in any case

    def close(self) -> None:
        self.barrier()  # rank 0 keeps the store that the others leave by
        dist.destroy_process_group()
        # Gloo's threads let go of the last tensors a moment later, and need Python for it: one that found it gone would
        # abort a job that has succeeded.
        time.sleep(0.2)


def _wait(work: Any) -> None:
    work.wait()


def meet(place: Place) -> Any:
    """The store through which the ranks find each other: at $MASTER_ADDR:$MASTER_PORT, else where all can know."""
    if "MASTER_ADDR" in os.environ:
        return _meet_as_told(place)
    if place.launcher == "mpirun":
        return _meet_by_mpi(place)
    if place.launcher == "srun":
        return _store(place, host_names(os.environ["SLURM_STEP_NODELIST"])[0], slurm_port(os.environ))
    raise UserError(
        f"{place.launcher} does not tell the ranks where to meet for comm.backend torch: start them with torchrun, "
        f"mpirun or srun, or set MASTER_ADDR and MASTER_PORT to a host and a free port of rank 0"
    )


def _meet_as_told(place: Place) -> Any:
    host, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    if not port.isdigit():
        raise UserError(f"MASTER_ADDR is set, but MASTER_PORT is {port!r}: set it to a free port of that host")
    try:  # torch's own way, since under torchrun the agent keeps the store, with a part of its own for each restart
        return next(dist.rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=MEETING)))[0]
    except dist.DistError as e:
        raise _nobody(place, host, port, e) from e


def _meet_by_mpi(place: Place) -> Any:
    store = None
    if place.rank == 0:
        host = "127.0.0.1" if place.local_size == place.size else socket.gethostname()
        store = _store(place, host, 0)
    try:
        host, port = mpi.broadcast((host, store.port) if store else None)
    except ImportError as e:
        raise UserError(
            "comm.backend torch under mpirun needs mpi4py, for the ranks to find each other: pip install mpi4py, or "
            "set MASTER_ADDR and MASTER_PORT to a host and a free port of rank 0"
        ) from e
    return store or _store(place, host, port)


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a job step agree on, below those that systems hand out by themselves."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0))
    return 12_000 + (7 * job + step) % 20_000


def _store(place: Place, host: str, port: int) -> Any:
    try:
        return dist.TCPStore(
            host, port, place.size, place.rank == 0, timeout=timedelta(seconds=MEETING), wait_for_workers=False
        )
    except dist.DistError as e:
        raise _nobody(place, host, port, e) from e


def _nobody(place: Place, host: str, port: int | str, error: Exception) -> UserError:
    return UserError(
        f"rank {place.rank} of {place.size} on {socket.gethostname()} could not meet the others at {host}:{port} "
        f"({str(error).splitlines()[0]}): is the port taken, a rank missing, or a firewall in between? MASTER_ADDR and "
        f"MASTER_PORT choose another place"
    )
