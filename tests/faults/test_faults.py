"""Everything that happens to jobs on clusters, done on purpose: nothing is lost but the steps since the last save.

FAULT_KILLS and FAULT_SAVES set how many random kills are made (20 and 50; CI makes fewer); FAULT_RECORD=1 keeps the
table as a record.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import pytest
import torch

from dist_lars import checkpoint, runlog
from tests.conftest import environment, run_command
from tests.faults.conftest import EPOCHS, OPTIONS, STEPS, Job

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("FAULT_KILLS", "20"))
SAVES = int(os.environ.get("FAULT_SAVES", "50"))
TOTAL = EPOCHS * STEPS


class Whole(NamedTuple):
    """What a run without a fault ends with, and what it logs on the way: so must every continued one."""

    checkpoint: dict[str, Any]
    losses: dict[int, float]
    seconds: float


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, fault_images):
    calm = Job(tmp_path_factory.mktemp("calm"), fault_images)
    assert calm.finish() == 0, calm.text()[-3000:]
    return Whole(checkpoint.load(calm.run_dir), calm.losses(), calm.seconds)


def same(a, b) -> bool:
    """Whether two checkpoints hold the same weights, buffers and momentum, to the last bit."""
    momenta = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (a, b)]
    return (
        all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        and all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
        and all(torch.equal(x, y) for x, y in zip(a["buffers"], b["buffers"], strict=True))
    )


PHASES = ["start", "step 2$", "step [4-9]$", "saving", "evaluating", "step [12].$"]


@pytest.mark.parametrize("n", range(KILLS))
def test_a_killed_rank(job, tell, untouched, n):
    """kill -9 of one rank in a random phase: the job ends, and the next one ends bit-identically."""
    rng = random.Random(n)
    rank, phase = rng.randrange(2), PHASES[n % len(PHASES)]
    broken = job().start()
    if phase == "start":
        pid = broken.rank_starts(rank)
        time.sleep(rng.uniform(0, 2.0))
    else:
        with broken.held(phase, rank) as pid:
            pass  # so that the phase was not missed; the rank is killed while it goes on
        time.sleep(rng.uniform(0, 0.02))
    hit = broken.phase(rank)[1] or "starting"
    os.kill(pid, signal.SIGKILL)
    assert broken.wait() != 0
    assert not broken.orphans()
    seconds, reached, saved = broken.seconds, broken.last_step(), broken.saved_step()
    assert reached - saved <= 3
    assert broken.finish() == 0, broken.text()[-3000:]
    assert same(checkpoint.load(broken.run_dir), untouched.checkpoint)
    assert broken.losses() == untouched.losses
    tell(f"kill -9 of rank {rank} while {hit}", "ended; continued bit-identically", seconds, max(0, reached - saved))


# torch is imported once: each line on stdin forks a process that saves until it is killed.
SAVER = """
import os, sys, torch
from pathlib import Path
from dist_lars import checkpoint
weights = torch.arange(4_000_000, dtype=torch.float32)
for _ in sys.stdin:
    if pid := os.fork():
        os.waitpid(pid, 0)
        print("ended", flush=True)
        continue
    for step in range(1, 100000):
        checkpoint.save(Path(sys.argv[1]), {"step": step, "weights": weights + step}, best=False, keep=2)
        if step == 1:
            print(os.getpid(), flush=True)
"""


def test_kills_during_saving(tmp_path, tell):
    """Counted only where a half-written file was left behind: a good checkpoint always remains."""
    began, counted, rng = time.monotonic(), 0, random.Random(0)
    folder = tmp_path / "checkpoints"
    words, pipe = [sys.executable, "-c", SAVER, str(folder)], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment()) as savers:
        for _ in range(20 * SAVES):
            if counted == SAVES:
                break
            savers.stdin.write("\n")
            savers.stdin.flush()
            saver = int(savers.stdout.readline())
            for _ in range(40):  # wait for a moment in which a file is half there
                time.sleep(rng.uniform(0.001, 0.02))
                if list(folder.glob(".step-*.pt.*")):
                    break
            os.kill(saver, signal.SIGKILL)
            assert savers.stdout.readline() == "ended\n"
            counted += any(not checkpoint.verify(path.read_bytes()) for path in folder.glob(".step-*.pt.*"))
            path, damaged = checkpoint.newest_good(tmp_path)
            assert damaged == []
            state = checkpoint.load(path)
            assert torch.equal(state["weights"], torch.arange(4_000_000, dtype=torch.float32) + state["step"])
            assert checkpoint.load(tmp_path)["step"] <= state["step"]
    assert counted == SAVES
    tell(
        f"kill -9 while saving, {counted} half-written files",
        "a good checkpoint each time",
        time.monotonic() - began,
        0,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_to_one_rank(job, tell, untouched, name):
    asked = job().start()
    with asked.held("step [4-9]$", 1) as pid:
        os.kill(pid, getattr(signal, name))
    assert asked.wait() == 75
    assert asked.status()["state"] == "stopped"
    assert asked.status()["reason"] == f"signal {name} on rank 1"
    step = asked.status()["step"]
    assert asked.saved_step() == step < TOTAL
    seconds = asked.seconds
    assert asked.finish() == 0
    assert same(checkpoint.load(asked.run_dir), untouched.checkpoint)
    tell(f"{name} to one rank", f"saved at step {step}, exit 75; continued bit-identically", seconds, 0)


@pytest.mark.parametrize(
    ("launcher", "name", "codes", "state"),
    [
        ("mpirun", "SIGUSR2", {75}, "stopped"),
        ("mpirun", "SIGTERM", None, None),
        ("horovodrun", "SIGUSR2", {75}, "stopped"),
        ("horovodrun", "SIGTERM", None, None),
        ("gloo", "SIGUSR2", None, None),
        ("gloo", "SIGTERM", None, None),
    ],
)
def test_a_signal_to_the_launcher(job, tell, untouched, launcher, name, codes, state):
    """mpirun hands SIGUSR2 on, to all processes of a rank; what a launcher does not hand on still leaves a good
    checkpoint and no orphans."""
    asked = job("--data.workers", "1", launcher=launcher).start()
    with asked.held("step [5-9]$") as pid:
        os.kill(asked.process.pid, getattr(signal, name))
        if state == "stopped":
            asked.wait_for_signal(pid)
    code = asked.wait()
    orphans = asked.orphans()
    assert codes is None or code in codes
    assert state is None or asked.status()["state"] == state
    assert not orphans
    seconds, saved = asked.seconds, asked.saved_step()
    assert saved >= 3
    assert asked.finish() == 0
    assert same(checkpoint.load(asked.run_dir), untouched.checkpoint)
    tell(f"{name} to {launcher}", f"exit {code}, good checkpoint of step {saved}, no orphans", seconds)


def test_a_stop_file(job, tell):
    asked = job().start()
    with asked.held("step [4-9]$"):
        (asked.run_dir / "STOP").touch()
    assert asked.wait() == 75
    assert asked.status()["reason"] == "file STOP"
    assert not (asked.run_dir / "STOP").exists()
    assert asked.saved_step() == asked.status()["step"]
    tell("STOP file", f"saved at step {asked.status()['step']}, exit 75", asked.seconds, 0)


@pytest.fixture(scope="module")
def limit(untouched):
    """Seconds that are enough to start, train for a while and save, however busy this machine is."""
    return int(15 + 1.5 * untouched.seconds)


def test_the_time_limit(job, tell, limit):
    limited = job("--epochs", "20000", "--max_time", f"{limit // 60}:{limit % 60:02}").start()
    assert limited.wait(limit + 240) == 75
    assert limited.status()["reason"] == "time limit"
    assert limited.saved_at() < (limited.phases / "started0").stat().st_mtime + limit
    assert limited.saved_step() == limited.status()["step"]
    tell(f"--max_time {limit} s", f"saved at step {limited.saved_step()}, exit 75", limited.seconds, 0)


def test_slurms_time_limit(job, tell, limit):
    end = int(time.time() + limit)
    limited = job("--epochs", "20000").start(SLURM_JOB_END_TIME=str(end))
    assert limited.wait(limit + 240) == 75
    assert limited.saved_at() < end
    assert limited.status()["reason"] == "time limit"
    assert limited.saved_step() == limited.status()["step"]
    tell("SLURM's end of the job", f"saved at step {limited.saved_step()}, exit 75", limited.seconds, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank(job, tell, rank):
    """A rank that is alive and does nothing: the others' watchdogs end the job."""
    hung = job("--guard.hang_seconds", "12").start()
    with hung.held("step [4-9]$", rank) as pid:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert hung.wait() != 0
    assert not hung.orphans()
    assert "made no progress for 12 s while in step" in hung.text()
    assert (hung.run_dir / f"stacks-rank{1 - rank}.txt").read_text().count("File ") > 3
    assert hung.saved_step() >= 3
    tell(f"SIGSTOP of rank {rank}", "watchdog: stacks dumped, job ended", time.monotonic() - began, 3)


def test_a_rank_that_hangs_in_python(job, tell):
    hung = job("--guard.hang_seconds", "12").start("hang", 1, 7)
    assert hung.wait() == 1
    assert "in hang" in (hung.run_dir / "stacks-rank1.txt").read_text()
    tell("rank 1 sleeps in its step", "watchdog: names the line that hangs", hung.seconds, 1)


def small_disk(folder):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("a small tmpfs needs root")


@pytest.mark.parametrize(
    ("policy", "room_again", "ends"),
    [("continue", True, "continued to the end"), ("continue", False, "trained to the end, last save refused"),
     ("stop", False, "ended at the next save")],
)  # fmt: skip
def test_a_full_disk(job, tell, untouched, policy, room_again, ends):
    full = job("--resume.on_save_error", policy, "--resume.keep", "1", "--log.tensorboard", "true")
    small_disk(full.run_dir)
    try:
        full.start()
        filler = full.run_dir / "filler"
        with full.held("step [5-9]$"), filler.open("wb", buffering=0) as f:
            with contextlib.suppress(OSError):  # which is what this is for
                while True:
                    f.write(b"0" * 4096)
        if room_again:
            with full.held("step [23].$"):
                filler.unlink()
        code = full.wait()
        good, damaged = checkpoint.newest_good(full.run_dir)
        assert good is not None
        assert not damaged
        assert not list((full.run_dir / "checkpoints").glob(".step*"))
        assert "could not be written: No space left on device" in full.text()
        if room_again:
            assert code == 0
            assert same(checkpoint.load(full.run_dir), untouched.checkpoint)
            assert full.status()["state"] == "finished"
            assert [line["step"] for line in runlog.read(full.run_dir, "train")] == list(range(1, TOTAL + 1))
        else:
            assert code not in (0, 75)
            assert ("step 48 could not be written" in full.text()) == (policy == "continue")
            assert full.saved_step() <= 12
        tell(f"disk full, {policy}" + ", then room again" * room_again, f"{ends}, exit {code}", full.seconds)
    finally:
        subprocess.run(["umount", "-l", str(full.run_dir)], check=True)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "foreign":
        data = bytearray(b"PK\x03\x04 something else entirely" * 50)
    else:
        at = {"header": 2, "weights": len(data) // 2, "directory": len(data) - 300, "checksum": len(data) - 5}[how]
        data[at] ^= 4
    path.write_bytes(bytes(data))


DAMAGES = ["truncated", "empty", "foreign", "header", "weights", "directory", "checksum"]


def test_damaged_checkpoints(job, tell, untouched):
    """Each kind in turn on the newest file: it is reported, passed over, and the run ends bit-identically."""
    stopped = job("--resume.keep", "9").start()
    with stopped.held("step 1[4-9]$") as pid:
        os.kill(pid, signal.SIGUSR2)
    assert stopped.wait() == 75
    files = sorted((stopped.run_dir / "checkpoints").glob("step-*.pt"))
    good = files[-1].read_bytes()
    for how in DAMAGES:
        damage(files[-1], how)
        assert checkpoint.newest_good(stopped.run_dir) == (files[-2], [files[-1]])
        files[-1].write_bytes(good)
    damage(files[-1], "weights")
    assert stopped.finish() == 0
    assert f"warning: checkpoint {files[-1]} is damaged and passed over" in stopped.text()
    assert same(checkpoint.load(stopped.run_dir), untouched.checkpoint)
    tell(f"checkpoint damaged: {', '.join(DAMAGES)}", "reported, the one before is used", stopped.seconds, 3)


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_nan_on_one_rank(job, tell, policy):
    broken = job("--guard.nonfinite", policy).start("nan", 1, 10)
    code = broken.wait()
    if policy == "stop":
        assert code == 2
        assert broken.status()["state"] == "failed"
        assert "step 11: the gradient of" in broken.text()
        assert "is saved for inspection in" in broken.text()
        saved = next((broken.run_dir / "failed").iterdir())
        assert all(torch.isfinite(v).all() for v in checkpoint.load(saved)["model"].values())
        tell("nan in a gradient of rank 1, stop", "all ranks stop at the step, layer named, state kept", broken.seconds)
        return
    assert code == 0, broken.text()[-3000:]
    kind = {"skip": "skip", "rollback": "rollback"}[policy]
    line = runlog.read(broken.run_dir, kind)[0]
    if policy == "rollback":
        assert (line["step"], line["lr_factor"]) == (9, 0.5)
        after = next(x for x in runlog.read(broken.run_dir, "train") if x["step"] == 12)
        assert after["lr"] < runlog.read(broken.run_dir, "train")[9]["lr"] * 0.6
    assert checkpoint.load(broken.run_dir)["counters"]["skipped"] == 1
    what = {"skip": "step skipped, counted", "rollback": "back to step 9 with half the learning rate"}[policy]
    tell(f"nan in a gradient of rank 1, {policy}", what, broken.seconds, 1)


def test_a_loss_that_stays_up(job, tell):
    lost = job("--guard.max_loss", "0.01", "--guard.max_loss_steps", "5").start()
    assert lost.wait() == 2
    assert "the loss has been above 0.01 since step 1" in lost.text()
    assert lost.status()["state"] == "failed"
    tell("a loss above its bound for 5 steps", "ended with the reason", lost.seconds, "-")


def test_a_changed_weight_on_one_rank(job, tell):
    drifted = job("--guard.check_steps", "4").start("weight", 1, 9)
    assert drifted.wait() == 2
    assert "step 12: the weights of rank 1 differ from rank 0's, first in" in drifted.text()
    assert drifted.status()["state"] == "failed"
    tell("a weight of rank 1 moved by 1e-6", "found at the next check, rank and tensor named", drifted.seconds, 3)


def test_a_dead_loader_worker(job, tell):
    broken = job("--data.workers", "1").start()
    with broken.held("step [4-9]$", 1) as pid:
        (worker,) = broken.loader_workers(pid)
        os.kill(worker, signal.SIGKILL)
    assert broken.wait() != 0
    assert f"loader worker {worker} was killed by SIGKILL" in broken.text()
    assert not broken.orphans()
    tell("kill -9 of a loader worker", "error that names the worker, job ended", broken.seconds, 3)


def test_a_corrupted_image_in_the_middle(job, tell, fault_images, tmp_path):
    import shutil

    images = tmp_path / "images"
    shutil.copytree(fault_images, images)
    (images / "train" / "class1" / "031.jpg").write_bytes(b"not an image")
    broken = job(images=images).start()
    assert broken.wait() != 0
    assert "class1/031.jpg" in broken.text()
    assert broken.status()["state"] == "failed"
    tell("an image that cannot be decoded", "the file is named, job ended", broken.seconds)


def test_a_run_directory_in_use(job, tell):
    first = job("--epochs", "2000").start()
    with first.held("step [4-9]$") as pid:
        began = time.monotonic()
        second = run_command(
            [sys.executable, "-m", "dist_lars.train", *OPTIONS, "--data.path", str(first.images), "--run_dir",
             str(first.run_dir)], 90,
        )  # fmt: skip
        assert second.returncode == 2
        assert "is in use by another job" in second.stdout
        tell("a second job in the same run directory", "refused", time.monotonic() - began, 0)
        os.kill(pid, signal.SIGUSR2)
    assert first.wait() == 75


OF_FOUR = ("--batch_size", "24", "--micro_batch", "2", "--precision", "fp32", "--comm.deterministic", "true")


@pytest.fixture(scope="module")
def on_four(tmp_path_factory, fault_images):
    """A run on 4 ranks to its end."""
    whole = Job(tmp_path_factory.mktemp("four"), fault_images, OF_FOUR, ranks=4)
    assert whole.finish() == 0, whole.text()[-3000:]
    return runlog.read(whole.run_dir, "train")


@pytest.mark.parametrize(
    ("launcher", "before", "after"), [("mpirun", 4, 1), ("horovodrun", 4, 2), ("gloo", 4, 3), ("mpirun", 2, 4)]
)
def test_another_number_of_ranks(job, tell, on_four, launcher, before, after):
    """A stopped run goes on with fewer ranks, or more: same images, same learning rates, losses to rounding."""
    moved = job(*OF_FOUR, launcher=launcher, ranks=before).start()
    with moved.held("step [4-6]$") as pid:
        os.kill(pid, signal.SIGUSR2)
    moved.wait()
    assert moved.status()["state"] == "stopped"
    moved.ranks = after
    assert moved.finish() == 0
    a, b = ({line["step"]: line for line in lines} for lines in (on_four, runlog.read(moved.run_dir, "train")))
    assert set(a) == set(b)
    off = max(abs(b[step]["loss"] / line["loss"] - 1) for step, line in a.items())
    assert off < 1e-5
    for step, line in a.items():
        assert b[step]["lr"] == line["lr"]
        assert b[step]["count"] == line["count"] == 24
    tell(f"{launcher}: {before} ranks stopped, {after} continue", f"same images and rates, losses within {off:.0e}",
         moved.seconds, 0)  # fmt: skip
