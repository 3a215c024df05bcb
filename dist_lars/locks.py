"""Locks between processes, on files: held until the file is closed, or the process ends, however it ends."""

import fcntl
import sys
from pathlib import Path
from typing import IO, Any

from dist_lars.errors import UserError


def lock(path: Path, *, wait: bool = False, needed: bool = False, shared: bool = False) -> IO[Any]:
    """Lock a file, made if need be; raises `BlockingIOError` when another process holds it, or waits for that one.

    Any number of processes may hold it as `shared` ones, and no other beside them.
    Some shared file systems have no locks: there a warning is printed, and nothing keeps a second job away; if the lock
    is `needed`, `UserError` is raised.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    except OSError as e:
        if needed:
            file.close()
            raise UserError(
                f"{path.parent} is on a file system without locks ({e.strerror}), and several jobs cannot share it: "
                f"choose another place"
            ) from e
        print(
            f"warning: {path.parent} is on a file system without locks ({e.strerror}): "
            f"make sure that no other job uses it at the same time",
            file=sys.stderr,
            flush=True,
        )
    return file
