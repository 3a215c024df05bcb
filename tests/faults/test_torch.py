"""The faults that ranks notice through each other, with torch.distributed in the place of Horovod."""

import os
import shutil
import signal

import pytest
import torch

from dist_lars import checkpoint

pytestmark = pytest.mark.faults
TORCH = ("--comm.backend", "torch")


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_killed_rank_ends_the_job_and_the_next_one_continues(job, tell, launcher):
    whole = job(*TORCH, launcher=launcher)
    assert whole.finish() == 0, whole.text()[-3000:]
    broken = job(*TORCH, launcher=launcher).start()
    with broken.held("step [12].$", 1) as pid:
        os.kill(pid, signal.SIGKILL)
    assert broken.wait() != 0
    assert not broken.orphans()
    seconds, lost = broken.seconds, broken.last_step() - broken.saved_step()
    assert broken.finish() == 0, broken.text()[-3000:]
    a, b = checkpoint.load(whole.run_dir), checkpoint.load(broken.run_dir)
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    tell(f"torch, {launcher}: kill -9 of rank 1", "ended; continued bit-identically", seconds, max(0, lost))


def test_a_signal_to_one_rank_stops_all(job, tell):
    asked = job(*TORCH, launcher="torchrun").start()
    with asked.held("step [4-9]$", 1) as pid:
        os.kill(pid, signal.SIGUSR2)
    assert asked.wait() != 0  # torchrun makes 1 of 75
    assert asked.status()["state"] == "stopped"
    assert asked.status()["reason"] == "signal SIGUSR2 on rank 1"
    assert asked.saved_step() == asked.status()["step"]
    tell("torch, torchrun: SIGUSR2 to one rank", f"saved at step {asked.saved_step()}", asked.seconds, 0)


def test_a_rank_that_hangs_is_named(job, tell):
    hung = job("--guard.hang_seconds", "12", *TORCH, launcher="torchrun").start("hang", 1, 7)
    assert hung.wait() != 0
    assert "rank 1 on" in hung.text()
    assert "in hang" in (hung.run_dir / "stacks-rank1.txt").read_text()
    assert not hung.orphans()
    tell("torch, torchrun: rank 1 sleeps in its step", "watchdog: names the line that hangs", hung.seconds, 1)


def test_the_cause_is_not_lost_in_what_follows_from_it(job, tell, fault_images, tmp_path):
    """The other rank loses its connection before torchrun ends it, and would say so."""
    images = tmp_path / "images"
    shutil.copytree(fault_images, images)
    (images / "train" / "class1" / "031.jpg").write_bytes(b"not an image")
    broken = job(*TORCH, launcher="torchrun", images=images).start()
    assert broken.wait() != 0
    assert broken.status()["state"] == "failed"
    assert "class1/031.jpg" in broken.status()["reason"]
    tell("torch, torchrun: an image that cannot be decoded", "the status names the file", broken.seconds)
