"""torchrun starts a training; a run begun by one backend goes on with the other."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dist_lars import checkpoint, runlog
from tests.conftest import CARRIERS, LAUNCHERS, ROOT, TORCHRUN, environment

pytestmark = pytest.mark.launch
TRAIN = ("python", "-m", "dist_lars.train")
OPTIONS = (
    "--preset", "quickstart", "--data.kind", "folder", "--batch_size", "8", "--micro_batch", "2", "--epochs", "3",
    "--data.image_size", "32", "--data.resize", "32", "--model.name", "cnn_small", "--precision", "fp32",
    "--log.every_steps", "1", "--optim.lr", "1", "--resume.keep", "9", "--resume.save_steps", "2",
)  # fmt: skip


def words(carrier: str, *more: str) -> list[str]:
    launcher, backend = CARRIERS[carrier]
    return [*launcher, "2", *TRAIN, *OPTIONS, "--comm.backend", backend, *more]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("horovod by MPI", "torch under torchrun", id="horovod to torch"),
        pytest.param("torch under mpirun", "horovod by gloo", id="torch to horovod", marks=pytest.mark.faults),
    ],
)
def test_a_run_goes_on_with_the_other_backend(command, image_folder, tmp_path, first, second):
    """Stopped in the middle of an epoch under one, resumed under the other: the numbers of the whole run."""
    data = ("--data.path", str(image_folder))
    done = command(*words(first, *data, "--run_dir", "whole"))
    assert done.returncode == 0, done.stdout[-3000:]
    middle = str(tmp_path / "whole" / "checkpoints" / "step-000000004.pt")
    done = command(*words(second, *data, "--run_dir", "other", "--resume.from", middle))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "continues at step 4" in done.stdout
    a, b = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "other")
    assert a["step"] == b["step"] == 9
    for key in a["model"]:
        torch.testing.assert_close(b["model"][key], a["model"][key], rtol=1e-5, atol=1e-6)
    for x, y in zip(a["buffers"], b["buffers"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    losses = [
        {line["step"]: line["loss"] for line in runlog.read(tmp_path / name, "train")} for name in ("whole", "other")
    ]
    assert losses[1] == pytest.approx({step: loss for step, loss in losses[0].items() if step > 4}, rel=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("then", ["torch under torchrun", "horovod by MPI"])
def test_a_signal_saves_under_torchrun_and_the_run_continues_there(command, image_folder, tmp_path, then):
    """SIGTERM to torchrun reaches all processes of every rank, as at the end of a batch job; either backend goes on."""
    options = ("--data.path", str(image_folder), "--run_dir", str(tmp_path / "r"), "--data.workers", "1")
    line = words("torch under torchrun", *options)
    line[line.index("--epochs") + 1] = "20"
    with (tmp_path / "out.txt").open("w") as out:
        job = subprocess.Popen(line, cwd=tmp_path, env=environment(), stdout=out, stderr=out, start_new_session=True)
        end = time.monotonic() + 90
        while not (tmp_path / "r" / "checkpoints" / "step-000000002.pt").exists():
            assert time.monotonic() < end, (tmp_path / "out.txt").read_text()[-3000:]
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) != 0
    status = runlog.read_status(tmp_path / "r")
    assert (status["state"], status["reason"].partition(" on")[0]) == ("stopped", "signal SIGTERM")
    line[: line.index("python")] = words(then)[: words(then).index("python")]
    line[line.index("--comm.backend") + 1] = CARRIERS[then][1]
    rarely = ("--log.eval_epochs", "20", "--resume.save_steps", "60", "--data.workers", "0")
    done = command(*line, *rarely, timeout=150)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"continues at step {status['step']}\n" in done.stdout
    assert runlog.read(tmp_path / "r", "end")[0]["step"] == 60


def test_wrong_launches_are_refused_with_the_way_out(command, image_folder):
    line = (*TRAIN, *OPTIONS, "--data.path", str(image_folder))
    by_torch = (*line, "--comm.backend", "torch")
    with ThreadPoolExecutor(2) as two:
        horovod = two.submit(command, *TORCHRUN, "2", *line)
        gloo = two.submit(command, *LAUNCHERS["gloo"], "2", *by_torch)
        knob = two.submit(command, *by_torch, "--comm.cycle_ms", "5")
        alone = two.submit(command, *by_torch, DIST_LARS_RANKS="2")
    for done, message in (
        (horovod, "started by torchrun, which Horovod does not know: add --comm.backend torch"),
        (gloo, "horovodrun does not tell the ranks where to meet for comm.backend torch"),
        (knob, "error: comm.cycle_ms is a knob of Horovod's: leave it out with comm.backend torch"),
        (alone, "DIST_LARS_RANKS=2 says that 2 ranks were started, but this process sees 1"),
    ):
        assert done.result().returncode != 0
        assert message in done.result().stdout
    assert horovod.result().stdout.count("started by torchrun") == 1  # by one rank


def test_tasks_of_srun_meet_without_mpi(tmp_path):
    """Stands in for srun: two processes with the variables of a job step."""
    step = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost", "DIST_LARS_TEST_BACKEND": "torch",
        "DIST_LARS_TEST_OUT": str(tmp_path),
    }  # fmt: skip
    worker = [sys.executable, str(ROOT / "tests/parallel/worker_shared.py")]
    tasks = [
        subprocess.Popen(worker, env=environment(**step, SLURM_PROCID=str(r), SLURM_LOCALID=str(r))) for r in (0, 1)
    ]
    assert [task.wait(90) for task in tasks] == [0, 0]
    for r in (0, 1):
        got = json.loads((tmp_path / f"rank{r}.json").read_text())["comm"]
        assert (got["local"], got["sum"]["half"], got["object"]) == ([r, 2], 1.0, {"from": 0})


def test_evaluation_under_torchrun(command, image_folder, tmp_path):
    data = ("--data.path", str(image_folder))
    assert command(*TRAIN, *OPTIONS, *data, "--run_dir", "r").returncode == 0
    evaluate = ("python", "-m", "dist_lars.evaluate", "--checkpoint", "r", *data)
    alone = command(*evaluate)
    shared = command(*TORCHRUN, "2", *evaluate, "--backend", "torch")
    lines = [next(x for x in d.stdout.splitlines() if x.startswith("{")) for d in (alone, shared)]
    one, two = map(json.loads, lines)
    assert one["count"] == two["count"] == 11
    assert one["top1"] == two["top1"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
