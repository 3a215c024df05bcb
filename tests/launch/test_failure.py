"""One failing rank ends the whole job soon, is named, and the exit code is not zero."""

import re
import sys
import time

import pytest
import torch

from dist_lars.models import build
from tests.conftest import CARRIERS, LAUNCHERS, MPIRUN, ROOT, SMALL_RUN

pytestmark = pytest.mark.launch
WORKER = str(ROOT / "tests" / "launch" / "worker_raise.py")
CASES = {
    "exception": (1, r"error: rank 1 of 2 on \S+ failed: RuntimeError: the sky fell"),
    "user_error": (0, r"error: this disk is full \(rank 0 of 2 on \S+\)"),
    "kill": (1, r"(?i)signal 9|signal: killed|exit"),
}


JOBS = {**CARRIERS, "horovodrun": (LAUNCHERS["horovodrun"], "horovod")}
FIRST = ("horovod by MPI", "torch under torchrun")  # in `make test`; the others in `make test-faults`


@pytest.mark.parametrize("job", [pytest.param(job, marks=[] if job in FIRST else pytest.mark.faults) for job in JOBS])
@pytest.mark.parametrize("how", list(CASES))
def test_one_failing_rank_ends_the_job(command, job, how):
    who, message = CASES[how]
    launcher, backend = JOBS[job]
    before = time.monotonic()
    done = command(*launcher, "2", sys.executable, WORKER, how, str(who), timeout=60, DIST_LARS_TEST_BACKEND=backend)
    assert time.monotonic() - before < 30
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout[-3000:]


TRAIN = ("python", "-m", "dist_lars.train", *SMALL_RUN)


def of_two(command, first: tuple[str, ...], second: tuple[str, ...], **extra: str) -> str:
    """What a job says whose two ranks are started by different words; it ends, and not by a time-out."""
    done = command(*MPIRUN, "-np", "1", *first, ":", "-np", "1", *second, timeout=90, **extra)
    assert done.returncode == 2, done.stdout[-3000:]
    assert "Traceback" not in done.stdout
    return done.stdout


def test_what_is_wrong_with_another_rank_alone_is_told(command, image_folder):
    """The first one waits for it in the library that joins them, and can say nothing."""
    alone = ("env", "-u", "DIST_LARS_DATA", *TRAIN)
    said = of_two(command, TRAIN, alone, DIST_LARS_DATA=str(image_folder))
    assert re.search(r"error: no data: name an image folder .*\(rank 1 on \S+\)", said)


def test_a_file_that_one_rank_alone_cannot_read_is_told(command, image_folder, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    torch.save(build("resnet_small", num_classes=3).state_dict(), tmp_path / "0" / "start.pt")
    words = (*TRAIN, "--data.path", str(image_folder), "--run_dir", str(tmp_path / "r"), "--model.weights", "start.pt")
    said = of_two(command, ("--wdir", str(tmp_path / "0"), *words), ("--wdir", str(tmp_path / "1"), *words))
    assert re.search(r"error: model.weights: start.pt does not exist \(on rank 1, \S+\)\n", said)
    assert said.count("error: ") == 1


def test_ranks_that_are_started_with_different_batches_are_told(command, image_folder):
    """Though one of them is wrong by itself."""
    words = (*TRAIN, "--data.path", str(image_folder))
    said = of_two(command, words, (*words, "--batch_size", "6"))
    assert "the configuration of rank 1 differs from rank 0's: 'batch_size: 8' on rank 0, 'batch_size: 6' on" in said


def test_an_image_that_one_rank_cannot_read_is_named(command, image_folder, tmp_path):
    import shutil

    shutil.copytree(image_folder, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "class1" / "004.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    done = command(
        *LAUNCHERS["mpirun"], "2", "python", "-m", "dist_lars.train", "--preset", "quickstart",
        "--data.kind", "folder", "--data.path", str(tmp_path / "images"), "--batch_size", "8", "--micro_batch", "4",
        "--run_dir", "r", timeout=90,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(r"error: cannot read image \S+/train/class1/004\.jpg: .* \(rank [01] of 2 on", done.stdout)
    assert '"state": "failed"' in (tmp_path / "r" / "status.json").read_text()
