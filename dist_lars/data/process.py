"""What every helper process of ours does first."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

import torch


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
