"""The doctor's look around on one rank of a cluster job: what it is, what it sees, where it may write."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

from dist_lars import __version__
from dist_lars.config import Config, data_path
from dist_lars.data.folder import split_folders
from dist_lars.data.shards import is_packed, read_meta
from dist_lars.data.stage import expand
from dist_lars.data.synthetic import cache_dir
from dist_lars.doctor import foreign_library, libmpi
from dist_lars.doctor_host import version
from dist_lars.doctor_reach import host_name
from dist_lars.doctor_verdict import Facts, Place
from dist_lars.errors import UserError
from dist_lars.inputs import stage_place
from dist_lars.resources import own_cores


def collect(comm: Any, config: Config, device: Any, run_dir: Path | None) -> Facts:
    """The facts of this rank. `comm` has joined the others, `device` is the torch.device that the rank will use."""
    import torch

    gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if gpu else None
    leads = comm.local_rank == 0
    unseen, fault = look_at_data(config) if leads else ("", "")
    return Facts(
        rank=comm.rank,
        host=host_name(),
        local_rank=comm.local_rank,
        local_size=comm.local_size,
        device=properties.name if properties else "cpu",
        device_id=str(getattr(properties, "uuid", "")) if properties else "",
        gpus_granted=int((os.environ.get("SLURM_GPUS_PER_NODE") or "0").rpartition(":")[2]),
        gpus_seen=torch.cuda.device_count(),
        cpu=cpu_model(),
        cores=len(own_cores()),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        operations=comm.carrier(),
        foreign_mpi=foreign_library(libmpi()) or "",
        versions=versions(torch),
        driver=_driver(),
        places=tuple(places(config, run_dir)) if leads else (),
        data=unseen,
        data_fault=fault,
    )


def versions(torch: Any) -> dict[str, str]:
    """What must be the same on every node, by name."""
    loaded = libmpi()
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "horovod", "numpy")},
        "dist_lars": __version__,
        "dist_lars's files": source_digest(Path(__file__).parent),
        "MPI library": Path(loaded[0]).name if loaded else "none",
    }


def source_digest(package: Path) -> str:
    """Ten letters that differ when a file of the package differs: a node with another checkout or an old container."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.yaml")]):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "none"
    found = re.search(r"Kernel Module\D*([\d.]+)", text)
    return found[1] if found else "unknown"


def cpu_model() -> str:
    """As the kernel names it."""
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    return found[1] if found else "unknown CPU"


def places(config: Config, run_dir: Path | None) -> list[Place]:
    """The directories that a rank of this run writes to, each tried."""
    found = [probe("scratch", os.environ.get("TMPDIR") or "/tmp"), probe("shared memory", "/dev/shm")]
    if run_dir is not None:
        found.append(probe("run directory", str(run_dir)))
    if config.data.kind == "digits":
        found.append(probe("cache", cache_dir()))
    if place := stage_place(config):
        try:
            found.append(probe("staging", expand(place)))
        except UserError as e:
            found.append(Place("staging", place, str(e)))
    return found


def probe(what: str, path: str) -> Place:
    """Whether a small file can be written there, and how much room is left."""
    folder = Path(path)
    trial = folder / f".dist_lars-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(b"x" * 4096)
        finally:
            trial.unlink(missing_ok=True)
        stat = os.statvfs(folder)
    except OSError as e:
        return Place(what, path, _why(e, folder))
    room = stat.f_bavail * stat.f_frsize
    return Place(what, path, free=room, files=stat.f_favail if stat.f_files else float("inf"))


def _why(error: OSError, folder: Path) -> str:
    text = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            stat = os.statvfs(folder)
        except OSError:
            return text
        free = f"{text}, though the file system has {stat.f_bavail * stat.f_frsize / 1e9:.1f} GB free"
        if error.errno == errno.EDQUOT:
            return f"{free}: a quota of bytes or of files (inodes)"
        if stat.f_bavail * stat.f_frsize > 1 << 20:
            return f"{free}: no more files (inodes)"
    return text


def look_at_data(config: Config) -> tuple[str, str]:
    """(why this node cannot see the images, or what is wrong with them), "" when they are fine.

    Looks at the folders' first entries, lists nothing.
    """
    path = data_path(config)
    if path is None:
        return "", ""
    try:
        Path(path, "train").stat()  # says why: not there, no permission, a stale mount
        for folder in split_folders(path, config.data.val):
            if is_packed(folder):
                (Path(folder) / read_meta(folder)["shards"][0]["name"]).open("rb").close()
            elif stage_place(config):
                return "", f"{folder} is an image folder, and data.stage copies packed shards: python -m dist_lars.pack"
            elif next(os.scandir(folder), None) is None:
                return "", f"{folder} is empty"
    except OSError as e:
        return f"{e.filename or path}: {e.strerror}", ""
    except UserError as e:
        return "", str(e)
    return "", ""
