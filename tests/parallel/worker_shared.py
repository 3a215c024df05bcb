"""One rank of the launches that many tests read: each part's report under its name.

worker_shared.py [alone]     alone: a process that knows of no others
"""

import sys

import torch
import worker_backends
import worker_comm
import worker_equivalence
from worker_tools import finish, join

from dist_lars import comm as ranks
from dist_lars.run import Run  # noqa: F401  (the whole trainer imports under MPI)


def main() -> None:
    torch.set_num_threads(1)
    comm = ranks.LocalComm() if "alone" in sys.argv else join(deterministic=True)
    parts = {"comm": worker_comm, "training": worker_equivalence, "sums": worker_backends}
    if type(comm).__name__ == "HorovodComm":
        import worker_allreduce
        import worker_optim_horovod

        parts |= {"horovod": worker_allreduce}
        if comm.size > 1:  # alone, Horovod's timeline stays empty
            parts |= {"wrapper": worker_optim_horovod}
    result = {"backend": type(comm).__name__, **{name: part.report(comm) for name, part in parts.items()}}
    finish(comm.rank, result)
    comm.close()


if __name__ == "__main__":
    main()
