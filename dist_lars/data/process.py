"""What every helper process of ours does first, and which signals it does not hear."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from typing import Any

import torch

# What asks a rank to save and stop. Open MPI 5 and torchrun send it to all processes of the rank's group, batch systems
# to all of a job: helpers that died of it would leave the rank without the batches that it needs until it has saved.
UNHEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def settle() -> None:
    """One thread; Ctrl-C is left to the parent, which tells its helpers to end; and no life after the parent's.

    A fork server lives as long as its children and they as long as the server, so a parent that was killed would
    leave them behind: torch's own watchdog looks at the server.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def start_server() -> None:
    """Start the fork server and the resource tracker, unless they run, with these signals blocked.

    That is inherited, by workers too, so that there is no moment at which one of them could be hit.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)  # again: starting the tracker has let SIGTERM in
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Killable(Popen):
    def terminate(self) -> None:
        self.kill()  # it does not hear SIGTERM, and its rank would wait for it


class Worker(ForkServerProcess):
    """A child of the fork server that its rank can end, though it does not hear SIGTERM."""

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:  # noqa: N802
        return _Killable(process_obj)
