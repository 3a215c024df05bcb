"""The ranks of a job: one process alone, or Horovod. The only file that imports horovod or mpi4py.

Every collective is called by all ranks in the same order; that is what keeps a job from hanging.
"""

import hashlib
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import nn

from dist_lars.errors import AgreedError, UserError
from dist_lars.reducer import Reducer

T = TypeVar("T")


class Comm(Protocol):
    """What the trainer needs of its ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add numbers over ranks in float64 (exact for counts below 2^53): one collective."""

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        """Begin to add small integers over ranks; the returned function waits for the sums. One at a time."""

    def average_(self, flat: torch.Tensor, name: str) -> None:
        """Replace a tensor by its mean over ranks."""

    def broadcast_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace tensors by rank 0's."""

    def gather(self, value: Any, name: str) -> list[Any]:
        """Every rank's value, on every rank, in order of rank."""

    def broadcast(self, value: Any, name: str) -> Any:
        """Rank 0's value."""

    def barrier(self) -> None:
        """Return when all ranks have called."""

    def reducer(self, parameters: Iterable[nn.Parameter], bucket_mb: float) -> Reducer | None:
        """The gradient averaging of this job; None where there is nothing to average."""

    def abort(self) -> NoReturn:
        """End all ranks of the job at once with exit code 1."""

    def close(self) -> None:
        """Leave the job in order."""


class LocalComm:
    """One process: every collective is the identity."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return {k: float(v) for k, v in values.items()}

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        return lambda: values

    def average_(self, flat: torch.Tensor, name: str) -> None:
        pass

    def broadcast_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass

    def gather(self, value: Any, name: str) -> list[Any]:
        return [value]

    def broadcast(self, value: T, name: str) -> T:
        return value

    def barrier(self) -> None:
        pass

    def reducer(self, parameters: Iterable[nn.Parameter], bucket_mb: float) -> Reducer | None:
        return None

    def abort(self) -> NoReturn:
        os._exit(1)

    def close(self) -> None:
        pass


class HorovodComm:
    """The ranks that horovodrun, mpirun or srun started."""

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.hvd = hvd
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        flat = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        total = self.hvd.allreduce(flat, name="sum." + ".".join(values), op=self.hvd.Sum)
        return dict(zip(values, total.tolist(), strict=True))

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        # int32, so that it is never fused with gradients: their sums must not depend on it
        handle = self.hvd.allreduce_async(torch.tensor(values, dtype=torch.int32), name="notes", op=self.hvd.Sum)
        return lambda: self.hvd.synchronize(handle).tolist()

    def average_(self, flat: torch.Tensor, name: str) -> None:
        self.hvd.allreduce_(flat, name=name, op=self.hvd.Average)

    def broadcast_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():  # through a contiguous copy: Horovod refuses channels-last
            tensor.copy_(self.hvd.broadcast(tensor.contiguous(), 0, name=f"broadcast.{name}"))

    def gather(self, value: Any, name: str) -> list[Any]:
        return self.hvd.allgather_object(value, name=f"gather.{name}")

    def broadcast(self, value: Any, name: str) -> Any:
        return self.hvd.broadcast_object(value, 0, name=f"object.{name}")

    def barrier(self) -> None:
        self.hvd.barrier()

    def reducer(self, parameters: Iterable[nn.Parameter], bucket_mb: float) -> Reducer | None:
        def start(flat: torch.Tensor, name: str) -> Any:
            return self.hvd.allreduce_async_(flat, name=name, op=self.hvd.Average)

        return Reducer(parameters, start, self.hvd.synchronize, bucket_mb) if self.size > 1 else None

    def abort(self) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        if self.hvd.mpi_enabled():
            import mpi4py

            mpi4py.rc(initialize=False, finalize=False)
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(1)
        os._exit(1)

    def close(self) -> None:
        self.hvd.shutdown()


# --- start ------------------------------------------------------------------------------------------------------------

CPU_DEFAULTS = {
    # Horovod's background thread wakes every ms and Open MPI waits by spinning: on a CPU rank both steal the core
    # that computes.
    "HOROVOD_CYCLE_TIME": "5",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
DEFAULTS = {
    # Horovod's own default is to wait for ever for a rank that never comes.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "60",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600",
}
DETERMINISTIC_DEFAULTS = {"HOROVOD_FUSION_THRESHOLD": "0"}  # which buckets get fused depends on timing


def start(*, cpu: bool, deterministic: bool) -> Comm:
    """Join the job that the launcher made; a process started alone is a job of one.

    Environment variables that the user set are left alone. Raises `UserError` when Horovod is missing, or sees another
    number of ranks than the launcher started.
    """
    expected, source = expected_ranks(os.environ)
    if expected is None:
        return LocalComm()
    for defaults in (DEFAULTS, CPU_DEFAULTS if cpu else {}, DETERMINISTIC_DEFAULTS if deterministic else {}):
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
    if importlib.util.find_spec("horovod") is None:
        if expected == 1:
            return LocalComm()
        raise UserError(
            f"{expected} ranks were started ({source}), but Horovod is not installed for {sys.executable}: "
            f"run `make install` in the source folder, or `python -m dist_lars.build_horovod`"
        )
    comm = HorovodComm()
    check_ranks(comm.size, expected, source)
    return comm


def expected_ranks(environment: Mapping[str, str]) -> tuple[int | None, str]:
    """How many ranks the launcher says it started, and who says so; (None, "") for a process started alone.

    The order matters: mpirun inside sbatch also sees the batch step's own SLURM variables.
    """
    for name in ("DIST_LARS_RANKS", "OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environment.get(name):
            return int(environment[name]), name
    return None, ""


def check_ranks(seen: int, expected: int, source: str) -> None:
    """Stop 64 processes that each believe to be rank 0 of 1."""
    if seen != expected:
        raise UserError(
            f"{source}={expected} says that {expected} ranks were started, but Horovod sees {seen} on "
            f"{socket.gethostname()}: the tasks are separate jobs, each training alone. The launcher and MPI do not "
            f"understand each other: under srun use --mpi=pmix (Open MPI 5 does not speak pmi2; `srun --mpi=list`), or "
            f"launch with the mpirun of the MPI that Horovod was built with, or with horovodrun"
        )


# --- built on the collectives -----------------------------------------------------------------------------------------


def on_first_rank(comm: Comm, action: Callable[[], T], name: str) -> T:
    """Run `action` on rank 0 and give its result to all ranks; a `UserError` there is raised on all of them."""
    outcome: tuple[bool, Any] = (True, None)
    if comm.rank == 0:
        try:
            outcome = (True, action())
        except UserError as e:
            outcome = (False, str(e))
    good, value = comm.broadcast(outcome, name)
    if not good:
        raise AgreedError(value)
    return value


def patiently(comm: Comm, acts: bool, action: Callable[[], T], name: str) -> T | None:
    """Run `action` on the ranks where `acts`, for as long as it takes; its result there, None on the others.

    The ranks that wait keep talking to each other, for Horovod ends a job whose ranks wait ten minutes in a collective.
    A `UserError` of any rank is raised on all of them.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action) if acts else None
        pause = 0.001
        while comm.sum({"busy": float(future is not None and not future.done())})["busy"]:
            time.sleep(pause)
            pause = min(0.2, 2 * pause)
    error = future.exception() if future else None
    said = comm.gather(f"{error}" if isinstance(error, UserError) else None, name)
    told = [f"{text} (on rank {r})" if comm.size > 1 else text for r, text in enumerate(said) if text is not None]
    if told:
        raise AgreedError(told[0] + f"; and {len(told) - 1} more ranks failed" * (len(told) > 1))
    return future.result() if future else None


def assert_same(comm: Comm, text: str, what: str) -> None:
    """Refuse to go on when ranks disagree about `what`, naming the ranks and the first difference."""
    digests = comm.gather(hashlib.sha256(text.encode()).hexdigest(), f"{what} digest")
    if len(set(digests)) == 1:
        return
    texts = comm.gather(text.splitlines(), f"{what} text")
    odd = next(r for r in range(comm.size) if digests[r] != digests[0])
    pairs = [(a, b) for a, b in zip(texts[0], texts[odd], strict=False) if a != b]
    first = f": {pairs[0][0].strip()!r} on rank 0, {pairs[0][1].strip()!r} on rank {odd}" if pairs else ""
    ranks = ", ".join(str(r) for r in range(comm.size) if digests[r] != digests[0])
    raise AgreedError(f"{what} of rank {ranks} differs from rank 0's{first}; all ranks must be started alike")


def sync_parameters(model: nn.Module, comm: Comm) -> None:
    """Give every rank rank 0's parameters; buffers stay each rank's own."""
    with torch.no_grad():
        comm.broadcast_(dict(model.named_parameters()))


def float_buffers(model: nn.Module) -> list[torch.Tensor]:
    """The buffers that ranks gather for themselves while training: BatchNorm's running statistics."""
    return [b for b in model.buffers() if b.is_floating_point()]


@contextmanager
def averaged_buffers(model: nn.Module, comm: Comm) -> Iterator[None]:
    """Inside, BatchNorm's running statistics are their mean over ranks; outside, every rank keeps its own."""
    buffers = float_buffers(model)
    own = pack(buffers)
    mean = own.clone()
    comm.average_(mean, "buffers")
    unpack(mean, buffers)
    try:
        yield
    finally:
        unpack(own, buffers)


def pack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors' values in one flat float64 vector (exact for every smaller float)."""
    return torch.cat([t.detach().reshape(-1).double() for t in tensors] or [torch.zeros(0, dtype=torch.float64)])


def unpack(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Write the values of `pack` back."""
    with torch.no_grad():
        for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(piece.view_as(t))
