"""A rank uses the cores it really has, whoever says so, and never more."""

import platform
import subprocess
import sys

import pytest
import torch

from dist_lars import resources
from dist_lars.comm import LocalComm
from tests.conftest import environment


class Two(LocalComm):
    """One of two ranks of a host."""

    def gather(self, value, name):
        host, cores = value
        return [(host, cores), (host, {c + 4 for c in cores} if self.bound else cores)]

    bound = False


@pytest.fixture
def host(monkeypatch):
    """`host(cores, quota, slurm)` is the machine that the functions see."""

    def make(cores, quota=float("inf"), slurm=None):
        monkeypatch.setattr(resources, "own_cores", lambda: set(range(cores)))
        monkeypatch.setattr(resources, "cpu_quota", lambda: quota)
        monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
        if slurm:
            monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(slurm))

    return make


@pytest.mark.parametrize(
    ("cores", "quota", "slurm", "alone", "each_of_two"),
    [
        (8, float("inf"), None, 8, 4),
        (8, 3.0, None, 3, 1),  # a container
        (8, float("inf"), 6, 6, 4),  # Slurm's word is a limit
        (2, float("inf"), 16, 2, 1),  # and no promise: this task is bound to two
        (1, 1.0, None, 1, 1),
    ],
)
def test_cores_per_rank(host, cores, quota, slurm, alone, each_of_two):
    host(cores, quota, slurm)
    assert resources.cores_per_rank(LocalComm()) == alone
    assert resources.cores_per_rank(Two()) == each_of_two


def test_ranks_bound_to_their_own_cores_keep_them(host):
    host(4)
    two = Two()
    two.bound = True
    assert resources.cores_per_rank(two) == 4


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_workers_and_threads_fit_the_cores(cores, kind, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    workers, threads = resources.share_cores(cores, torch.device(kind), None)
    assert workers + threads <= cores
    assert workers >= 0
    assert threads >= 1


def test_quota_is_the_smallest_of_the_groups_that_enclose_us(monkeypatch):
    files = {
        "/proc/self/cgroup": "0::/slurm/job_1",
        "/sys/fs/cgroup/cpu.max": "max 100000",
        "/sys/fs/cgroup/slurm/cpu.max": "800000 100000",
        "/sys/fs/cgroup/slurm/job_1/cpu.max": "350000 100000",
        "/sys/fs/cgroup/slurm/memory.max": "1000",
        "/sys/fs/cgroup/slurm/memory.current": "300",
        "/proc/meminfo": "MemTotal: 9 kB MemAvailable: 5 kB",
    }
    monkeypatch.setattr(resources, "_words", lambda path: files.get(path, "").split())
    assert resources.cpu_quota() == 3.5
    assert resources.free_memory() == 700
    del files["/sys/fs/cgroup/slurm/memory.max"]
    assert resources.free_memory() == 5120
    files["/sys/fs/cgroup/slurm/job_1/cpu.max"] = files["/sys/fs/cgroup/slurm/cpu.max"] = "max 100000"
    assert resources.cpu_quota() == float("inf")


FAULTS = """
import resource, sys, torch
from dist_lars.resources import keep_memory
if sys.argv[1] == "keep":
    keep_memory(torch.device("cpu"))
for _ in range(20):  # until the heap is large enough
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another C library")
@pytest.mark.parametrize(
    ("word", "variables", "kept"), [("keep", {}, True), ("", {}, False), ("keep", {"MALLOC_TOP_PAD_": "0"}, False)]
)
def test_what_a_cpu_rank_frees_is_kept_for_the_next_step(word, variables, kept):
    """40 MB at a time: without huge pages 10,000 faults each."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, word], env=environment(**variables), capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 100) is kept
