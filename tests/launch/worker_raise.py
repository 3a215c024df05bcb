"""A job of which one rank fails in the way named on the command line, while the others wait for it."""

import os
import signal
import sys

from dist_lars import comm as ranks
from dist_lars import launch
from dist_lars.errors import UserError
from tests.parallel.worker_tools import join


def main(how: str, who: int) -> None:
    def action(comm: ranks.Comm) -> None:
        if comm.rank == who and how == "exception":
            raise RuntimeError("the sky fell")
        if comm.rank == who and how == "user_error":
            raise UserError("this disk is full")
        if comm.rank == who and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        comm.sum({"never": 1.0})

    launch.as_job(join, action)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
