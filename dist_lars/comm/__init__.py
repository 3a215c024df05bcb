"""The ranks of a job: one process alone, Horovod's, or torch.distributed's.

`horovod` and `mpi4py` are imported in `horovod_comm` and `mpi` alone, `torch.distributed` in `torch_comm` alone.
"""

from dist_lars.comm.base import Comm, LocalComm
from dist_lars.comm.start import Backend, check_ranks, start
from dist_lars.comm.together import (
    assert_same,
    averaged_buffers,
    float_buffers,
    on_every_rank,
    on_first_rank,
    pack,
    patiently,
    sync_parameters,
    unpack,
)

__all__ = [
    "Backend",
    "Comm",
    "LocalComm",
    "assert_same",
    "averaged_buffers",
    "check_ranks",
    "float_buffers",
    "on_every_rank",
    "on_first_rank",
    "pack",
    "patiently",
    "start",
    "sync_parameters",
    "unpack",
]
