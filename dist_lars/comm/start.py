"""Joining the job that a launcher made."""

import importlib.util
import os
import socket
import sys
from typing import NamedTuple

from dist_lars.comm.base import Comm, LocalComm
from dist_lars.errors import UserError
from dist_lars.launchers import expected_ranks, launcher_of, place_of

PATIENCE = 600  # seconds until a rank gives up waiting for another
CPU_DEFAULTS = {
    # Horovod's background thread wakes every ms and Open MPI waits by spinning: on a CPU rank both steal the core
    # that computes.
    "HOROVOD_CYCLE_TIME": "5",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Buckets that are sent together are first copied together, and back, by that same core.
    "HOROVOD_FUSION_THRESHOLD": "0",
}
DEFAULTS = {
    # Horovod's own default is to wait for ever for a rank that never comes.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "60",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(PATIENCE),
}
DETERMINISTIC_DEFAULTS = {"HOROVOD_FUSION_THRESHOLD": "0"}  # which buckets get fused depends on timing


class Backend(NamedTuple):
    """Who carries the ranks' words, and how Horovod's knobs are set; None leaves one as it is by default."""

    name: str = "horovod"  # or "torch"
    deterministic: bool = False
    cycle_ms: float | None = None
    fusion_mb: float | None = None
    cache: int | None = None
    hierarchical: bool | None = None

    def knobs(self) -> dict[str, str]:
        """The knobs that were asked for, as Horovod reads them."""
        asked = {
            "HOROVOD_CYCLE_TIME": self.cycle_ms,
            "HOROVOD_FUSION_THRESHOLD": None if self.fusion_mb is None else int(self.fusion_mb * 2**20),
            "HOROVOD_CACHE_CAPACITY": self.cache,
            "HOROVOD_HIERARCHICAL_ALLREDUCE": None if self.hierarchical is None else int(self.hierarchical),
        }
        return {name: f"{value:g}" if isinstance(value, float) else str(value)
                for name, value in asked.items() if value is not None}  # fmt: skip


def start(*, cpu: bool, backend: Backend = Backend()) -> Comm:  # noqa: B008  it is immutable
    """Join the job that the launcher made; a process started alone is a job of one.

    What `backend` asks for wins over environment variables, and these over the defaults for the device. Raises
    `UserError` when Horovod is missing, or sees another number of ranks than the launcher started.
    """
    expected, source = expected_ranks(os.environ)
    if expected is None:
        return LocalComm()
    if backend.name == "torch":
        return _torch(cpu, expected, source)
    os.environ.update(backend.knobs())
    for defaults in (DEFAULTS, CPU_DEFAULTS if cpu else {}, DETERMINISTIC_DEFAULTS if backend.deterministic else {}):
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
    if importlib.util.find_spec("horovod") is None:
        if expected == 1:
            return LocalComm()
        raise UserError(
            f"{expected} ranks were started ({source}), but Horovod is not installed for {sys.executable}: "
            f"run `make install` in the source folder, or `python -m dist_lars.build_horovod`; `--comm.backend torch` "
            f"needs no Horovod"
        )
    if launcher_of(os.environ) == "torchrun":
        raise UserError(
            f"{expected} ranks were started by torchrun, which Horovod does not know: add --comm.backend torch, or "
            f"launch with horovodrun, mpirun or srun"
        )
    from dist_lars.comm.horovod_comm import HorovodComm

    comm = HorovodComm()
    check_ranks(comm.size, expected, source)
    return comm


def _torch(cpu: bool, expected: int, source: str) -> Comm:
    from dist_lars.comm.torch_comm import TorchComm

    place = place_of(os.environ)
    if place is None or place.size != expected:
        check_ranks(place.size if place else 1, expected, source, "this process")
    assert place is not None
    return TorchComm(place, cpu=cpu, seconds=PATIENCE)


def check_ranks(seen: int, expected: int, source: str, who: str = "Horovod") -> None:
    """Stop 64 processes that each believe to be rank 0 of 1."""
    if seen != expected:
        raise UserError(
            f"{source}={expected} says that {expected} ranks were started, but {who} sees {seen} on "
            f"{socket.gethostname()}: the tasks are separate jobs, each training alone. The launcher and MPI do not "
            f"understand each other: under srun use --mpi=pmix (Open MPI 5 does not speak pmi2; `srun --mpi=list`), or "
            f"launch with the mpirun of the MPI that Horovod was built with, or with horovodrun"
        )
