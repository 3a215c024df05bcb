"""The two things that are asked of MPI itself; one of the two files that import mpi4py or horovod."""

import sys
from typing import Any, NoReturn


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank that mpirun started. Starts MPI; raises ImportError without mpi4py."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.bcast(value)


def abort() -> NoReturn:
    """End every rank of this MPI job with exit code 1; MPI must be running."""
    sys.stdout.flush()
    sys.stderr.flush()
    import mpi4py

    mpi4py.rc(initialize=False, finalize=False)
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)
    raise AssertionError("MPI_Abort returned")
