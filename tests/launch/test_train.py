"""The user's own commands, from the first run to the resumed one."""

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dist_lars import checkpoint, runlog
from tests.conftest import LAUNCHERS, MPIRUN, SMALL_RUN, environment

pytestmark = pytest.mark.launch
TRAIN = ("python", "-m", "dist_lars.train")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The README's first run, shortened: (folder it ran in, its output)."""
    from tests.conftest import run_command

    folder = tmp_path_factory.mktemp("first")
    words = ["horovodrun", "-np", "2", *TRAIN, "--preset", "quickstart", "--epochs", "3", "--run_dir", "run"]
    done = run_command(words, 170, cwd=folder, DIST_LARS_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stdout[-3000:]
    return folder, done.stdout


def test_the_first_run_tells_what_it_does(quickstart):
    folder, output = quickstart
    for words in (
        "plan of quickstart",
        "peak learning rate: ",
        "images/s",
        "epoch 3: top-1",
        "finished: top-1",
        "run/log.jsonl",
    ):
        assert words in output
    assert output.count("plan of quickstart") == 1  # rank 0 speaks for all
    assert runlog.read_status(folder / "run")["state"] == "finished"
    assert list((folder / "run" / "tensorboard").iterdir())
    assert [line["kind"] for line in runlog.read(folder / "run") if line["kind"] != "train"] == [
        "start",
        *3 * ["eval"],
        "end",
    ]


def test_the_first_run_learns(quickstart):
    folder, _ = quickstart
    assert runlog.read(folder / "run", "eval")[-1]["top1"] > 80
    losses = [line["loss"] for line in runlog.read(folder / "run", "train")]
    assert losses[-1] < losses[0] / 2  # of the least, 0.5, that label smoothing leaves


def test_a_checkpoint_evaluates_to_what_the_log_says(quickstart, command):
    folder, output = quickstart
    data = next((folder / "cache").glob("digits-*"))
    words = ("python", "-m", "dist_lars.evaluate", "--checkpoint", str(folder / "run"), "--data.path", str(data))
    assert f"python -m dist_lars.evaluate --checkpoint run --data.path {data}" in output
    last = runlog.read(folder / "run", "eval")[-1]
    for launcher, told in (([], words), ([*LAUNCHERS["mpirun"], "2"], words[:-2])):
        done = command(*launcher, *told, DIST_LARS_DATA=str(data))
        got = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        assert set(got) == {"loss", "top1", "top5", "count"}
        assert (got["top1"], got["top5"], got["count"]) == (last["top1"], last["top5"], 297)
        assert got["loss"] == pytest.approx(last["loss"], rel=0.02)  # another batch size in bfloat16


def test_a_finished_run_is_not_trained_again(quickstart, command):
    folder, _ = quickstart
    again = ("--preset", "quickstart", "--epochs", "3", "--run_dir", str(folder / "run"))
    done = command(*TRAIN, *again, DIST_LARS_CACHE=str(folder / "cache"))
    assert done.returncode == 0
    steps = runlog.read(folder / "run", "end")[0]["step"]
    assert f"continues at step {steps}\n" in done.stdout
    refused = command(*TRAIN, *again, "--optim.lr", "3", DIST_LARS_CACHE=str(folder / "cache"))
    assert refused.returncode == 2
    assert "holds another run (optim.lr: 4.0 -> 3.0); choose another --run_dir" in refused.stdout


@pytest.mark.parametrize("launcher", ["mpirun", "gloo", "alone"])
def test_every_launcher_trains_a_folder(command, image_folder, tmp_path, launcher):
    words = [] if launcher == "alone" else [*LAUNCHERS[launcher], "2"]
    data = ("--data.path", str(image_folder))
    done = command(*words, *TRAIN, *SMALL_RUN, *data, "--run_dir", "r", timeout=150, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\| +torch$", done.stdout, re.M)
    assert not re.search(r"\| +torch\._dynamo$", done.stdout, re.M)  # 2 s of every rank, for nothing
    assert runlog.read(tmp_path / "r", "end")[0]["step"] == 9
    assert runlog.read(tmp_path / "r", "eval")[-1]["count"] == 11


def test_synthetic_images_and_the_default_run_dir(command, tmp_path):
    done = command(
        *TRAIN, *SMALL_RUN, "--data.kind", "synthetic", "--data.train_images", "16", "--data.val_images", "4",
        "--optim.name", "sgd_momentum", "--epochs", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("quickstart-2")


def killed_after_first_epoch(folder, words):
    """Start the command, wait for its first checkpoint, kill everything at once."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(words, cwd=folder, env=environment(), stdout=null, stderr=null, start_new_session=True)
    deadline = time.monotonic() + 90
    while checkpoint.find(folder / "b") is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(folder)], check=False)  # Open MPI's ranks have groups of their own
    process.wait()


def test_a_killed_run_continues_to_the_same_weights(command, image_folder, tmp_path):
    def words(name):
        data = ("--data.path", str(image_folder))
        return [*MPIRUN, "-np", "2", *TRAIN, *SMALL_RUN, *data, "--run_dir", str(tmp_path / name)]

    assert command(*words("a"), timeout=150).returncode == 0
    killed_after_first_epoch(tmp_path, words("b"))
    done = command(*words("b"), timeout=150)
    assert "continues at step" in done.stdout
    a, b = checkpoint.load(tmp_path / "a"), checkpoint.load(tmp_path / "b")
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    for i, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][i][name]))
    assert all(torch.equal(x, y) for x, y in zip(a["buffers"], b["buffers"], strict=True))
    assert runlog.read(tmp_path / "a", "eval")[-1]["loss"] == runlog.read(tmp_path / "b", "eval")[-1]["loss"]


def refusal(done):
    assert done.returncode == 2, done.stdout[-2000:]
    assert "Traceback" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "error: " in line]
    return line


def test_wrong_input_is_refused_without_a_traceback(command, image_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        (): "no data: name an image folder",
        ("--data.path", "nowhere"): "data folder nowhere does not exist",
        ("--preset", "quickstart", "--data.path", "nowhere"): "data.path nowhere would not be read",
        ("--data.path", str(empty)): "has no train/ folder",
        ("--epoch", "3"): "did you mean epochs",
        ("--preset", "resnet18-8k"): "did you mean 'resnet18_8k'",
        ("--optim.lr", "fast"): "optim.lr is 'fast', but it must be a number",
        ("--data.path", str(image_folder), "--batch_size", "6", "--micro_batch", "4"): "batch_size 6 does not divide",
        ("--data.path", str(image_folder), "--batch_size", "128"): "batch_size 128 is larger than the 24",
        ("--data.kind", "synthetic", "--precision", "fp16", "--device", "cpu"): "fp16 needs CUDA",
    }  # fmt: skip
    with ThreadPoolExecutor(2) as two:
        done = two.map(lambda words: command(*TRAIN, *words, DIST_LARS_DATA=""), cases)
        for (words, message), one in zip(cases.items(), done, strict=True):
            assert message in refusal(one), words


def test_no_data_says_so_soon(command):
    before = time.monotonic()
    assert "no data: name an image folder" in refusal(command(*TRAIN, DIST_LARS_DATA=""))
    assert time.monotonic() - before < 5  # nothing heavy is imported before
    before = time.monotonic()
    done = command(*LAUNCHERS["horovodrun"], "2", *TRAIN, DIST_LARS_DATA="", timeout=60)
    assert time.monotonic() - before < 20
    assert "no data: name an image folder" in refusal_under_launcher(done)


def refusal_under_launcher(done):
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "error: " in line and "mpirun" not in line]
    return line


def test_a_batch_that_does_not_divide_is_refused_on_every_rank(command, image_folder):
    words = (*TRAIN, *SMALL_RUN, "--data.path", str(image_folder), "--batch_size", "12", "--micro_batch", "4")
    done = command(*LAUNCHERS["mpirun"], "2", *words)
    assert "12 does not divide by 2 ranks x micro_batch 4" in refusal_under_launcher(done)


def test_tasks_launched_as_separate_jobs_are_stopped(command):
    done = command(*TRAIN, "--preset", "quickstart", DIST_LARS_RANKS="2")
    assert "DIST_LARS_RANKS=2 says that 2 ranks were started, but Horovod sees 1" in refusal(done)


def test_a_checkpoint_of_another_model_is_refused(quickstart, command, image_folder):
    folder, _ = quickstart
    path = str(checkpoint.find(folder / "run"))
    cache = {"DIST_LARS_CACHE": str(folder / "cache")}
    words = (*TRAIN, "--preset", "quickstart", "--epochs", "3", "--resume.from", path)
    other = command(*words, "--model.name", "resnet34", **cache)
    assert "is of a run with other options or images (model.name: resnet18 -> resnet34)" in refusal(other)
    evaluated = command("python", "-m", "dist_lars.evaluate", "--checkpoint", path, "--data.path", str(image_folder))
    assert "knows 10 classes (0, 1, 2 ...)" in refusal(evaluated)
