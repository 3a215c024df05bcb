"""How every command of many ranks ends: an error is told, and one failing rank ends the whole job."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from dist_lars.cli import fail
from dist_lars.comm import Comm
from dist_lars.errors import AgreedError, UserError
from dist_lars.stopping import EXIT_STOPPED
from dist_lars.supervisor import Stopped


def as_job(start: Callable[[], Comm], action: Callable[[Comm], object]) -> None:
    """Join the ranks, act, leave; never returns normally when anything failed on this rank."""
    try:
        comm = start()
    except UserError as e:
        fail(e)
    try:
        action(comm)
    except Stopped as e:
        _leave_together(comm, str(e), EXIT_STOPPED)
    except AgreedError as e:
        _leave_together(comm, f"error: {e}", 2)
    except BaseException as e:
        _fail_alone(comm, e)
    comm.close()


def _leave_together(comm: Comm, text: str, code: int) -> NoReturn:
    if comm.rank == 0:
        print(text, file=sys.stderr, flush=True)
    comm.barrier()  # launchers kill everyone at the first exit: let rank 0 speak before
    comm.close()
    raise SystemExit(code)


def _fail_alone(comm: Comm, error: BaseException) -> NoReturn:
    """The other ranks know nothing of this error and wait in a collective: end them too."""
    who = f"rank {comm.rank} of {comm.size} on {socket.gethostname()}"
    if isinstance(error, UserError):
        print(f"error: {error}" + f" ({who})" * (comm.size > 1), file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        print(f"error: {who} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if comm.size == 1:
        os._exit(2 if isinstance(error, UserError) else 1)
    comm.abort()
