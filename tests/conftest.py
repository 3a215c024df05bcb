"""Shared by all tests: real ranks with a time-out, the user's own commands, and a tiny folder of real images."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image
from plugin_skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # not resolved: the environment's own bin, where mpirun and horovodrun lie

Finished = subprocess.CompletedProcess

# What a study of the tests trains: seconds a run, on 1,500 handwritten digits.
TINY_STUDY = {
    "data": {"kind": "digits", "image_size": 16, "resize": 16, "flip": False, "workers": 0, "cache": "decoded",
             "train_images": 1500, "val_images": 297},
    "model": {"name": "cnn_small"}, "micro_batch": 32, "precision": "fp32", "device": "cpu",
}  # fmt: skip

# A machine that does something else is no failure; CI says the same twice.
hypothesis.settings.register_profile("busy", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("busy")


def environment(**extra: str) -> dict[str, str]:
    """What a user's shell would have: the environment's bin first, the source folder importable, one thread a rank."""
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if os.geteuid() == 0:  # Open MPI refuses root without these
        for prefix in ("OMPI", "PRTE"):
            env |= {f"{prefix}_ALLOW_RUN_AS_ROOT": "1", f"{prefix}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**env, **extra}


def run_command(words: list[str], timeout: float, cwd: Path | None = None, **extra: str) -> Finished:
    """Run a command in its own session; on a time-out the whole session is killed and the test fails."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**extra),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)  # of all groups in its session
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout:g} s: {' '.join(words)}\n{output[-3000:]}")
    return Finished(words, process.returncode, output, "")


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Finished]:
    """`command("python", "-m", ..., timeout=60)` runs the user's own words in an empty folder."""

    def run(*words: str, timeout: float = 120, **extra: str) -> Finished:
        return run_command(list(words), timeout, cwd=tmp_path, **extra)

    return run


MPIRUN = ("mpirun", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE")
LAUNCHERS = {
    "mpirun": (*MPIRUN, "-np"),
    "horovodrun": ("horovodrun", "-np"),
    "gloo": ("horovodrun", "--gloo", "-np"),
}
# A training of seconds on a folder of images, for dist_lars.train; of an option given again, the last one counts.
SMALL_RUN = (
    "--preset", "quickstart", "--model.name", "resnet_small", "--data.kind", "folder", "--batch_size", "8",
    "--micro_batch", "2", "--epochs", "3", "--log.every_steps", "1", "--optim.lr", "1",
)  # fmt: skip
TORCHRUN = ("torchrun", "--standalone", "--no-python", "--nproc-per-node")
# Every way to carry gradients: (launcher, comm.backend).
CARRIERS = {
    "horovod by MPI": (LAUNCHERS["mpirun"], "horovod"),
    "horovod by gloo": (LAUNCHERS["gloo"], "horovod"),
    "torch under torchrun": (TORCHRUN, "torch"),
    "torch under mpirun": (LAUNCHERS["mpirun"], "torch"),
}


def start_ranks(folder: Path, np: int, worker: str, *args: str, timeout: float = 120, launcher: str = "mpirun",
                carrier: str | None = None, **extra: str) -> list[dict[str, Any]]:  # fmt: skip
    """Run WORKER on real ranks and return one dict per rank, as the worker wrote it.

    A worker joins by `join()` and calls `finish(rank, {...})` of tests/parallel/worker_tools.py, which writes
    $DIST_LARS_TEST_OUT/rankN.json. `carrier`, a key of CARRIERS, stands for launcher and backend.
    """
    start, backend = CARRIERS[carrier] if carrier else (LAUNCHERS[launcher], "horovod")
    words = [*start, str(np), sys.executable, str(ROOT / worker), *args]
    extra |= {"DIST_LARS_TEST_OUT": str(folder), "DIST_LARS_TEST_BACKEND": backend}
    done = run_command(words, timeout, cwd=folder, **extra)
    assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}\n{done.stdout[-5000:]}"
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(np)]


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """`launch(3, "tests/parallel/worker_x.py", "arg")` -> one dict per rank; see `start_ranks`."""
    return lambda *args, **kwargs: start_ranks(tmp_path_factory.mktemp("ranks"), *args, **kwargs)


@pytest.fixture(scope="module")
def launch_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """`launch` for module fixtures: starting ranks is what costs, so many tests read one launch."""
    return lambda *args, **kwargs: start_ranks(tmp_path_factory.mktemp("ranks"), *args, **kwargs)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of JPEG files as ImageNet has it: 3 classes that colour tells apart, 24 + 11 images."""
    return paint(tmp_path_factory.mktemp("images"), 24, 11, lambda i: (40 + i, 50), quality=95)


def paint(root: Path, train: int, val: int, size: Callable[[int], tuple[int, int]] = lambda i: (32, 32),
          **options: Any) -> Path:  # fmt: skip
    """Write ROOT/{train,val}/CLASS/*.jpg, noise of 3 classes that colour tells apart; `size`: (height, width) of i."""
    rng = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            pixels = rng.randint(0, 120, (*size(i), 3), dtype=np.uint8)
            pixels[..., i % 3] += 120
            folder = root / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", **options)
    return root


def kept(batches: Any) -> list[tuple[Any, Any]]:
    """All batches at once: copies, for a batch's memory is used again."""
    return [(pixels.clone(), labels.clone()) for pixels, labels in batches]
