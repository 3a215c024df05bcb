"""One SLURM for all tests of this folder, and images for its jobs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Network
from tests.cluster.slurm import Slurm, obstacle, work_folder
from tests.conftest import paint


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A login node and two compute nodes with munge, slurmctld, slurmd and sshd; all of it ends with the tests."""
    if why := obstacle():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "work").mkdir()
    with Network(folder, ["login", "n1", "n2"], sshd=True) as net:
        cluster = Slurm(net, folder, work_folder(folder / "work"))
        cluster.start()
        yield cluster


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 3 classes that colour tells apart: 64 images for training, 11 for validation."""
    return paint(tmp_path_factory.mktemp("images"), 64, 11)


@pytest.fixture
def submit(slurm: Slurm, images: Path) -> Iterator[Callable[..., Any]]:
    """`submit("resnet18_8k", options of sbatch..., run=(options of train...), NAME=value)`; cancelled in the end."""
    jobs = []

    def start(template: str, *options: str, run: tuple[str, ...] = (), **extra: str) -> Any:
        extra = {"DIST_LARS_DATA": str(images), **extra}
        jobs.append(slurm.submit(template, *SMALL_JOB, *options, run=(*SMALL_RUN, *run), **extra))
        return jobs[-1]

    yield start
    for job in jobs:
        slurm.on("scancel", job.number, check=False)


# Small overrides of what the templates ask for.
SMALL_JOB = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
SMALL_RUN = (
    "--device", "cpu", "--precision", "fp32", "--model.name", "cnn_small", "--model.zero_gamma", "false",
    "--data.image_size", "32", "--data.resize", "32", "--batch_size", "8", "--micro_batch", "4", "--epochs", "4",
    "--optim.lr", "1", "--schedule.warmup_epochs", "1", "--log.every_steps", "1", "--log.tensorboard", "false",
)  # fmt: skip
