"""Packed shards copied to a node's own disk: once per node, verified, and found again by the next job."""

import hashlib
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dist_lars.data.shards import INDEX, META, read_meta
from dist_lars.errors import UserError
from dist_lars.locks import lock

USED = ".used"
THREADS = 8
BLOCK = 8 << 20
_used: dict[str, IO[Any]] = {}  # copy -> this process's lock on it, which says that a job reads from there


def stage_name(folder: str) -> str:
    """What a packed folder's copy is called: the same for the same shards, wherever they lie."""
    read_meta(folder)
    return f"dist_lars-{hashlib.sha256((Path(folder) / META).read_bytes()).hexdigest()[:16]}"


def expand(place: str) -> str:
    """The folder that `--data.stage` names on this node; its variables may differ from node to node."""
    path = os.path.expandvars(place)
    if "$" in path:
        raise UserError(f"data.stage {place}: the variable is not set on {socket.gethostname()}; name a folder")
    return str(Path(path).expanduser().absolute())


def stage(folder: str, target: str) -> int:
    """Copy a packed folder to `target` and return the bytes that had to be copied; 0: an earlier job left it whole.

    A shard gets its name when its SHA-256 is right, shards.json comes last: what has a name is good. Until this process
    ends, or calls `unstage`, no other job removes the copy.
    """
    meta, place = read_meta(folder), Path(target)
    try:
        with _alone(place):  # two jobs on one node: the second waits, and finds the copy
            _used[target] = lock(place / USED, shared=True, wait=True)
            missing = [s for s in meta["shards"] if not _is_there(place / s["name"], s["bytes"])]
            size = sum(s["bytes"] for s in missing)
            free = shutil.disk_usage(place).free
            if size > 0.98 * free:
                raise UserError(
                    f"data.stage: {folder} needs {size / 1e9:.1f} GB more in {target} on {socket.gethostname()}, which "
                    f"has {free / 1e9:.1f} GB free; choose another place, make room, or train without it"
                )
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda s: _copy(Path(folder) / s["name"], place / s["name"], s["sha256"]), missing))
            for name in (INDEX, META):
                _copy(Path(folder) / name, place / name, None)
    except OSError as e:
        raise UserError(f"data.stage: cannot copy {folder} to {target} on {socket.gethostname()}: {e}") from e
    return size


def unstage(target: str) -> None:
    """Remove a copy, unless another job reads from it."""
    place = Path(target)
    with _alone(place):
        if target in _used:
            _used.pop(target).close()
        with suppress(BlockingIOError), lock(place / USED):
            shutil.rmtree(target, ignore_errors=True)


def _alone(place: Path) -> IO[Any]:
    """The lock of a copy's folder, which is made if need be; another job may remove both while this one waits."""
    path = place / f".lock.{socket.gethostname()}"
    while True:
        place.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            held = lock(path, wait=True)
            if path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
                return held
            held.close()


def _is_there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _copy(source: Path, target: Path, digest: str | None) -> None:
    aside = target.with_name(f".{target.name}.{socket.gethostname()}")
    seen = hashlib.sha256()
    with source.open("rb") as original, aside.open("wb") as copy:
        while block := original.read(BLOCK):
            seen.update(block)
            copy.write(block)
    if digest is not None and seen.hexdigest() != digest:
        aside.unlink()
        raise UserError(f"shard {source} is not what was packed (its SHA-256 differs): copy or pack it again")
    aside.replace(target)


def advice(workers: int, packed: bool, staged: bool, cached: bool) -> str:
    """What to change when training waits for its images."""
    ways = [f"more cores and --data.workers per rank (now {workers})"]
    if not packed and not cached:
        ways.insert(0, "pack the images (python -m dist_lars.pack SRC DST): smaller JPEGs decode three times faster")
    if packed and not staged and not cached:
        ways.append("shards on the node's own disk (--data.stage DIR)")
    if not cached:
        ways.append("a small set in memory (--data.cache decoded)")
    return "; or ".join(ways)
