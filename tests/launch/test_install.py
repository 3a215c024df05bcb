"""What an installed environment must be like: the doctor agrees, Horovod can move, no other MPI gets in."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dist_lars import build_facts, doctor, doctor_host
from dist_lars.build_facts import PATCH, digest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
# Two ranks, each says who it is; nothing but Horovod is imported.
PROGRAM = "import horovod.torch as hvd; hvd.init(); print(f'rank {hvd.rank()} of {hvd.size()}', flush=True)"


def test_the_doctor_finds_nothing_that_stops_training(tmp_path):
    words = [sys.executable, "-m", "dist_lars.doctor", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    for name in ("horovodrun", "horovodrun --gloo", "mpirun"):
        assert "all-reduce over 2 ranks" in checks[name]["value"]


def horovod_library() -> Path:
    folder = Path(importlib.util.find_spec("horovod").origin).parent / "torch"
    return next(folder.glob("mpi_lib_v2*.so"))


def runpath(library: Path) -> list[str]:
    """DT_RUNPATH of a 64-bit little-endian ELF file, without binutils: program headers -> dynamic -> strings."""
    data = library.read_bytes()

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")

    table, entry, count = number(32, 8), number(54, 2), number(56, 2)
    segments = [table + i * entry for i in range(count)]

    def offset(address: int) -> int:
        """Where the file keeps what is loaded at an address (p_type 1: loaded)."""
        for at in segments:
            start, length = number(at + 16, 8), number(at + 32, 8)
            if number(at, 4) == 1 and start <= address < start + length:
                return address - start + number(at + 8, 8)
        raise AssertionError(hex(address))

    dynamic = next(at for at in segments if number(at, 4) == 2)
    start, length = number(dynamic + 8, 8), number(dynamic + 32, 8)
    tags = {number(at, 8): number(at + 8, 8) for at in range(start, start + length, 16)}
    assert 15 not in tags, "DT_RPATH would win over the user's LD_LIBRARY_PATH"
    text = offset(tags[5]) + tags[29]
    return data[text : data.index(b"\0", text)].decode().split(":")


def test_horovod_names_no_folder_of_the_environment_that_built_it():
    paths = runpath(horovod_library())
    site = [path for path in paths if not path.startswith("$ORIGIN/")]
    home = build_facts.installed_build()["mpi_home"]
    assert bool(site) == bool(home), f"absolute folders in the RUNPATH: {site}; built on the MPI of {home}"
    found = [Path(path.replace("$ORIGIN", str(horovod_library().parent))).resolve() for path in paths]
    assert Path(sysconfig.get_path("purelib")).resolve() / "torch/lib" in found
    assert home or any((folder / "libmpi.so.40").exists() for folder in found)


def test_the_installed_horovod_is_the_one_that_this_source_builds():
    build = build_facts.installed_build()
    assert build["patch"] == digest(PATCH.read_bytes())
    assert importlib.metadata.version("horovod") == f"{build_facts.VERSION}+{build_facts.key_of(build)}"


def test_what_the_wheel_depends_on_is_asked_of_this_machine(monkeypatch):
    build = build_facts.installed_build()
    monkeypatch.setenv("HOROVOD_BUILD_ARCH_FLAGS", "-mavx2")
    monkeypatch.setenv("HOROVOD_CPU_OPERATIONS", "GLOO")
    monkeypatch.setenv("MPI_HOME", build["mpi_home"] or sys.prefix)
    here = build_facts.facts()
    assert (here.pop("arch_flags"), here.pop("options")["HOROVOD_CPU_OPERATIONS"]) == ("-mavx2", "GLOO")
    assert here == {name: value for name, value in build.items() if name not in ("arch_flags", "options")}


@pytest.fixture
def foreign_mpirun(tmp_path: Path) -> Path:
    """Another MPI, first on PATH: it would start one process that knows of no other."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "mpirun").write_text('#!/bin/sh\necho "mpirun (Open MPI) 3.1.6"\n[ "$1" = --version ]\n')
    (folder / "mpirun").chmod(0o755)
    return folder


def test_horovodrun_by_its_full_path_takes_its_own_mpi_whatever_is_on_path(foreign_mpirun, tmp_path):
    """A job script has no activated environment, and a module may have put another MPI first."""
    env = {"HOME": str(tmp_path), "PATH": f"{foreign_mpirun}:{os.defpath}"}
    words = [BIN / "horovodrun", "-np", "2", sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d of \d", done.stdout)) == ["rank 0 of 2", "rank 1 of 2"], done.stderr


# --- the doctor's diagnoses ------------------------------------------------------------------


def test_the_doctor_names_a_foreign_mpi(monkeypatch, foreign_mpirun):
    monkeypatch.setenv("PATH", f"{foreign_mpirun}:{os.environ['PATH']}")
    check = doctor.check_mpi()
    assert check.status == "warn"
    assert f"PATH finds {foreign_mpirun}/mpirun, but Horovod was built on" in check.value
    assert "use horovodrun" in check.fix


def build_of(**changed) -> dict:
    return {**build_facts.installed_build(), **changed}


@pytest.mark.parametrize(
    ("build", "value"),
    [
        (None, "not installed"),
        ({}, "not built by dist_lars: it lacks the fixes for Open MPI 5"),
        ({"torch": "2.9.0"}, "was built for torch 2.9.0, here is 2."),
        ({"patch": "0123456789"}, "was built for patch 0123456789, here is "),
        ({"python": "cpython-39-x86_64-linux-gnu"}, "was built for python cpython-39-x86_64-linux-gnu, here is "),
        ({"arch_flags": "-mavx -mfma"}, "was built for CPUs with -mavx, which this one lacks; CPUs with -mfma"),
    ],
)
def test_the_doctor_names_what_horovod_was_not_built_for(monkeypatch, build, value):
    monkeypatch.setattr(doctor, "installed_build", lambda: build_of(**build) if build else build)
    monkeypatch.setattr(
        doctor, "cpu_flags", lambda: set() if build and "arch_flags" in build else {"avx", "f16c", "fma"}
    )
    check = doctor.check_build()
    assert check.status == "FAIL"
    assert value in check.value
    assert "dist_lars.build_horovod" in check.fix


def test_the_doctor_names_a_torch_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    check = doctor_host.check_torch()
    assert check.status == "FAIL"
    assert re.match(r"torch \d\S+, torchvision \d\S+: ModuleNotFoundError", check.value)
    assert "pip install torch torchvision" in check.fix


@pytest.mark.parametrize(
    ("reports", "code", "value"),
    [
        ([{"size": 1, "sum": 1.0}] * 2, 0, "2 processes, but each sees 1 rank(s)"),
        ([{"size": 2, "sum": 3.0}], 0, "exit code 0"),
        ([], 1, "exit code 1: mpirun was unable"),
        ([], None, "no answer within"),
        ([{"size": 2, "sum": 3.0, "libmpi": ["/opt/other/lib/libmpi.so.40"]}] * 2, 0, "loads /opt/other/lib/libmpi.so"),
    ],
)
def test_the_doctor_names_what_is_wrong_with_two_ranks(monkeypatch, reports, code, value):
    output = "mpirun was unable\n" + "".join(f"[1,0]<stdout>: DOCTOR {json.dumps(report)}\n" for report in reports)
    monkeypatch.setattr(doctor, "run_ranks", lambda words: (code, output))
    check = doctor.check_ranks("mpirun", ["mpirun", "-np", "2"])
    assert check.status == "FAIL"
    assert value in check.value
    assert check.fix


def test_a_failing_check_fails_the_doctor_and_spares_the_ranks(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed_build", lambda: None)
    monkeypatch.setattr(doctor, "check_ranks", lambda *_: pytest.fail("nothing to start"))
    assert doctor.main([]) == 1
    assert "FAIL  horovod            not installed" in capsys.readouterr().out


def test_a_check_that_breaks_is_reported(monkeypatch):
    def check_moon():
        raise OSError("no moon")

    assert doctor.guarded(check_moon).value == "OSError: no moon"


# --- make ------------------------------------------------------------------------------------


def make(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *words], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def test_make_lists_every_target():
    shown = make("help").stdout
    for target in ("install", "train", "test", "check", "fmt", "doctor", "mutants", "clean"):
        assert re.search(rf"^  make {target} +\w", shown, re.M), target


def test_make_refuses_an_old_python_by_name(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    done = make("install", f"VENV={tmp_path}/env", f"PYTHON={old}")
    assert done.returncode
    assert f"Python 3.11 or newer is needed, and {old} is Python 3.9.2: make PYTHON=FILE" in done.stdout


def test_make_names_the_package_that_makes_environments(tmp_path):
    bare = tmp_path / "python3"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    bare.chmod(0o755)
    done = make("install", f"VENV={tmp_path}/env", f"PYTHON={bare}")
    assert done.returncode
    assert "apt install python3-venv" in done.stdout


def test_make_names_the_missing_compiler(tmp_path):
    done = make("install", f"VENV={tmp_path}/env", f"PYTHON={sys.executable}", CXX="no-such-compiler")
    assert done.returncode
    assert "No C++ compiler: apt install g++, or set CXX" in done.stdout


def options(tmp_path: Path, **env: str) -> str:
    """What the environment remembers of the options of its builds."""
    (tmp_path / ".made").touch()
    make(f"{tmp_path}/.options", f"VENV={tmp_path}", **env)
    return (tmp_path / ".options").read_text()


def test_the_options_of_the_build_are_remembered(tmp_path):
    assert options(tmp_path) == ""
    first = options(tmp_path, HOROVOD_GPU_OPERATIONS="NCCL", HOROVOD_BUILD_ARCH_FLAGS="-mavx -mfma")
    assert "export HOROVOD_GPU_OPERATIONS=NCCL\n" in first
    assert "export HOROVOD_BUILD_ARCH_FLAGS=-mavx\\ -mfma\n" in first
    stamp = (tmp_path / ".options").stat().st_mtime_ns
    assert options(tmp_path) == first  # a plain `make train` later keeps the GPU build
    assert (tmp_path / ".options").stat().st_mtime_ns == stamp
    assert "/opt/site-mpi" in options(tmp_path, MPI_HOME="/opt/site-mpi")


def test_a_host_without_an_address_is_a_warning(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "nobody.invalid")
    check = doctor_host.check_host_name()
    assert check.status == "warn"
    assert "127.0.0.1 nobody.invalid" in check.fix
