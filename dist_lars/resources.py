"""What this rank may use: its device, its cores, its number format."""

import ctypes
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from dist_lars.comm import Comm
from dist_lars.errors import UserError

#: Number formats as options name them; None: float32, or as the tensors are.
FORMATS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def on_cpu(wanted: str) -> bool:
    """Whether the option `device` means the CPU here."""
    return wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available())


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU; a job scheduler that shows each task one GPU makes that one number 0."""
    if on_cpu(wanted):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; `python -m dist_lars.doctor` says why")
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise UserError(f"local rank {local_rank} has no GPU: this host has {count}; start at most {count} ranks on it")
    device = torch.device("cuda", 0 if count == 1 else local_rank)
    torch.cuda.set_device(device)
    return device


def pick_autocast(wanted: str, device: torch.device) -> torch.dtype | None:
    """The number format of forward and backward; None is float32 throughout."""
    if wanted == "fp16" and device.type != "cuda":
        raise UserError("precision fp16 needs CUDA (loss scaling); on the CPU use bf16 or fp32")
    if wanted == "auto":
        return torch.bfloat16 if has_bf16(device) else None
    return FORMATS[wanted]


def name_of_format(dtype: torch.dtype | None) -> str:
    """What `precision` calls the format that was picked."""
    return next(name for name, value in FORMATS.items() if value == dtype)


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 runs in hardware: emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # not Linux
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & words)


def keep_memory(device: torch.device) -> None:
    """Let glibc keep what a CPU rank frees, for the next step wants it again; MALLOC_* and GLIBC_TUNABLES win.

    Otherwise every large activation is mapped anew in each step, and each of its pages faults: a sixth of a step of
    ResNet-18 (docs/decisions/0009).
    """
    told = any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name[-1] == "_") for name in os.environ)
    if told or device.type != "cpu" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):  # which is glibc's alone
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: its free end is never given back
    libc.mallopt(-2, 64 * 2**20)  # M_TOP_PAD: it grows by this much


def own_cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cores() -> int:
    """The cores that this process may use: those it is allowed to run on, within the container's CPU quota."""
    return max(1, int(min(len(own_cores()), cpu_quota())))


def cores_per_rank(comm: Comm) -> int:
    """This rank's share of its host: cores allowed to any rank there, over the ranks that share them.

    `--bind-to none` gives every rank all cores, `--map-by slot` some launchers bind each to its own: the union over
    the host's ranks covers both. SLURM_CPUS_PER_TASK and the container's CPU quota may make it less, never more.
    """
    here = socket.gethostname()
    shared = [cores for host, cores in comm.gather((here, own_cores()), "cores") if host == here]
    share = int(min(len(set().union(*shared)), cpu_quota())) // len(shared)
    told = os.environ.get("SLURM_CPUS_PER_TASK")
    return max(1, min(share, int(told)) if told else share)


def cpu_quota() -> float:
    """CPUs that the control groups of this process (container, batch job) grant; infinite without a limit."""
    found = [_quota(f"{group}/cpu.max", lambda w: float(w[0]) / float(w[1])) for group in control_groups()]
    found.append(_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", lambda w: float(w[0]) / 100_000))
    return max(1.0, min(found))


def control_groups() -> list[str]:
    """Folders of this process's control group (version 2) and of those it lies in."""
    own = next((line[3:] for line in _words("/proc/self/cgroup") if line.startswith("0::")), "/")
    parts = [p for p in own.split("/") if p not in ("", "..")]
    return ["/sys/fs/cgroup" + "".join(f"/{p}" for p in parts[:n]) for n in range(len(parts) + 1)]


def _quota(path: str, parse: Callable[[list[str]], float]) -> float:
    try:
        value = parse(_words(path))
    except (ValueError, IndexError):  # absent, or "max"
        return float("inf")
    return value if value > 0 else float("inf")


def _words(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except OSError:
        return []


def free_memory() -> float:
    """Bytes that this process and its children may still take: the host's, within the limits of its control groups."""
    found = [float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")]
    words = _words("/proc/meminfo")
    if "MemAvailable:" in words:
        found = [float(words[words.index("MemAvailable:") + 1]) * 1024]
    for group in control_groups():
        limit, used = _words(f"{group}/memory.max"), _words(f"{group}/memory.current")
        if limit and used and limit[0] != "max":
            found.append(float(limit[0]) - float(used[0]))
    return max(0.0, min(found))


def share_cores(cores: int, device: torch.device, workers: int | None) -> tuple[int, int]:
    """(loader workers, compute threads) of a rank with so many cores, never more than it has.

    A GPU rank computes elsewhere: all cores but one decode. A CPU rank decodes far faster than it trains: a quarter.
    """
    if workers is None:
        workers = min(16, cores - 1) if device.type == "cuda" else cores // 4
    threads = int(os.environ.get("OMP_NUM_THREADS") or (1 if device.type == "cuda" else max(1, cores - workers)))
    return workers, threads


def use_cores(cores: int, device: torch.device, workers: int | None) -> tuple[int, int]:
    """`share_cores`, and from now on this process computes with its share and keeps its memory."""
    workers, threads = share_cores(cores, device, workers)
    torch.set_num_threads(threads)
    keep_memory(device)
    return workers, threads
