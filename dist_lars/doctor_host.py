"""The doctor's checks that need one process: Python, torch, GPU, decoder, and what the machine allows."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_lars import __version__
from dist_lars.build_facts import cpu_flags
from dist_lars.pillow_simd import COST, obstacle


@dataclasses.dataclass
class Check:
    """One line of the report."""

    name: str
    status: str  # ok, warn, FAIL
    value: str
    fix: str = ""


def as_json(checks: Sequence[Check]) -> str:
    """A list of checks, for programs."""
    return json.dumps([dataclasses.asdict(check) for check in checks], indent=1)


def fail(name: str, value: str, fix: str) -> Check:
    """A check without which several ranks cannot train."""
    return Check(name, "FAIL", value, fix)


def warn(name: str, value: str, fix: str) -> Check:
    """A check that costs something, but does not stop training."""
    return Check(name, "warn", value, fix)


def check_python() -> Check:
    """Which interpreter and which dist_lars this is."""
    value = f"{sys.version.split()[0]}, dist_lars {__version__} in {Path(__file__).parent}"
    return Check("python", "ok", value)


def check_torch() -> Check:
    """Whether torch and torchvision import and belong together."""
    value = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
    try:
        import torch  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch raises RuntimeError
        fix = "install a pair that belongs together: pip install torch torchvision -c constraints.txt"
        return fail("torch", f"{value}: {type(error).__name__}: {error}", fix)
    return Check("torch", "ok", value)


def version(name: str) -> str:
    """The version of an installed package, or that it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def check_cuda() -> Check:
    """Whether torch uses the GPUs that the machine has."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Check("gpu", "ok", f"{torch.cuda.device_count()} x {', '.join(names)}, CUDA {torch.version.cuda}")
    if Path("/dev/nvidiactl").exists():
        return warn(
            "gpu", f"torch {torch.__version__} cannot use it", "a newer driver, or a torch for its CUDA version"
        )
    return Check("gpu", "ok", "none: training runs on the CPU")


def check_decoder() -> Check:
    """Which library decodes images."""
    import PIL
    from PIL import features

    turbo = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg, not turbo"
    value = f"PIL {PIL.__version__}, {turbo}"
    names = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    if ".post" in PIL.__version__:
        if "avx2" not in cpu_flags():
            return fail(
                "decoder", f"{value} needs AVX2, which this CPU lacks", "pip uninstall pillow-simd; pip install pillow"
            )
        return Check("decoder", "ok", f"{value}, pillow-simd")
    if reason := obstacle():
        return warn("decoder", f"{value}, plain Pillow: {COST}", f"{reason}, then python -m dist_lars.pillow_simd")
    again = "Pillow was installed over pillow-simd" if "pillow-simd" in names else "plain Pillow"
    return warn("decoder", f"{value}, {again}: {COST}", "python -m dist_lars.pillow_simd")


def check_cores() -> Check:
    """How much computing this process may do, as its affinity and its container allow."""
    from dist_lars.resources import cpu_quota, own_cores

    allowed = min(len(own_cores()), cpu_quota())
    return Check("cores", "ok", f"{allowed:g} of {os.cpu_count()} for this process")


def check_shared_memory() -> Check:
    """Loader workers and ranks of one host pass data through it; Docker gives 64 MB."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if free < 1:
        return warn("shared memory", f"{free:.2f} GB free in /dev/shm", "docker run --ipc=host, or --shm-size=8g")
    return Check("shared memory", "ok", f"{free:.1f} GB free in /dev/shm")


def check_host_name() -> Check:
    """Gloo asks for the address of the host's own name, and crashes without a word where there is none."""
    name = socket.gethostname()
    try:
        return Check("host name", "ok", f"{name}, {socket.gethostbyname(name)}")
    except OSError:
        return warn("host name", f"{name} has no address: Gloo cannot start", f"add `127.0.0.1 {name}` to /etc/hosts")


def check_open_files() -> Check:
    """Loader workers hold many files and sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 1024:
        return warn("open files", f"limit {soft}", f"ulimit -n {min(hard, 65536)} before you launch")
    return Check("open files", "ok", f"limit {soft}")


CHECKS = (
    check_python, check_torch, check_cuda, check_decoder, check_cores, check_shared_memory, check_host_name,
    check_open_files,
)  # fmt: skip
