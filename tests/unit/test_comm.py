"""Who counts the ranks, and what happens when the launcher and Horovod disagree."""

import os
import re
import socket
from types import SimpleNamespace

import pytest
import torch

from dist_lars.comm import (
    Backend,
    LocalComm,
    averaged_buffers,
    check_ranks,
    on_every_rank,
    on_first_rank,
    pack,
    start,
    unpack,
)
from dist_lars.comm.horovod_comm import HorovodComm
from dist_lars.comm.torch_comm import slurm_port
from dist_lars.errors import AgreedError, UserError
from dist_lars.resources import on_cpu, pick_autocast, pick_device, share_cores


def test_tasks_that_are_separate_jobs_are_stopped():
    check_ranks(4, 4, "OMPI_COMM_WORLD_SIZE")
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS=64 .* Horovod sees 1 .*separate jobs.*--mpi=pmix"):
        check_ranks(1, 64, "SLURM_STEP_NUM_TASKS")


def test_what_is_asked_for_beats_the_environment_and_that_the_defaults(monkeypatch):
    """Of Horovod's knobs, as it will read them when it starts."""

    class Two:  # stands in for Horovod, which would want two processes
        size = 2

    monkeypatch.setattr("dist_lars.comm.horovod_comm.HorovodComm", Two)
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_SIZE": "2", "HOROVOD_CYCLE_TIME": "3"})
    start(cpu=True)
    assert os.environ["HOROVOD_CYCLE_TIME"] == "3"
    assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "0"
    assert os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "600"
    start(cpu=True, backend=Backend(cycle_ms=20.0, fusion_mb=64.0, cache=0, hierarchical=True))
    assert {k: v for k, v in os.environ.items() if k.startswith("HOROVOD") and "STALL" not in k} == {
        "HOROVOD_CYCLE_TIME": "20", "HOROVOD_FUSION_THRESHOLD": "67108864", "HOROVOD_CACHE_CAPACITY": "0",
        "HOROVOD_HIERARCHICAL_ALLREDUCE": "1",
    }  # fmt: skip


def test_gpus_keep_horovods_own_pace(monkeypatch):
    monkeypatch.setattr("dist_lars.comm.horovod_comm.HorovodComm", lambda: SimpleNamespace(size=2))
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_SIZE": "2"})
    start(cpu=False)
    assert not {"HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD"} & set(os.environ)
    start(cpu=False, backend=Backend(deterministic=True))
    assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "0"


def test_tasks_of_a_job_step_agree_on_a_port():
    ports = {slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in (7, 8) for step in (0, 1)}
    assert len(ports) == 4
    assert all(12_000 <= slurm_port({"SLURM_JOB_ID": str(n)}) < 32_000 for n in (1, 10**6, 2**31 - 1))


def test_an_error_on_the_first_rank_is_everyones():
    def refuse():
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        on_first_rank(LocalComm(), refuse, "test")
    assert on_first_rank(LocalComm(), lambda: 3, "test") == 3


def test_ranks_that_say_the_same_say_it_once_and_others_are_named():
    class Four(LocalComm):
        size, others = 4, None

        def gather(self, value, name):
            return [value, *(self.others or 3 * [value])]

    def refuse():
        raise UserError("no such folder")

    four, own = Four(), re.escape(socket.gethostname())
    assert on_every_rank(four, lambda: 3, "test") == 3
    with pytest.raises(AgreedError, match="^no such folder$"):
        on_every_rank(four, refuse, "test")
    four.others = [None, ("no such file", "n2"), ("no room", "n3")]
    with pytest.raises(AgreedError, match=rf"^no such folder \(on rank 0, {own}\); and 2 more failed$"):
        on_every_rank(four, refuse, "test")
    with pytest.raises(AgreedError, match=r"^no such file \(on rank 2, n2\); and 1 more failed$"):
        on_every_rank(four, lambda: 3, "test")


def test_buffers_are_given_back_even_after_an_error():
    model = torch.nn.BatchNorm1d(3)
    model.running_mean += 1

    class Other(LocalComm):
        def average_(self, flat, name):
            flat.fill_(9)

    def fail_inside():
        with averaged_buffers(model, Other()):
            assert model.running_mean.tolist() == [9, 9, 9]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert model.running_mean.tolist() == [1, 1, 1]


def test_packing_keeps_every_bit():
    a, b = torch.randn(3, 2), torch.randn(4).bfloat16()
    flat, copies = pack([a, b]), [torch.zeros_like(a), torch.zeros_like(b)]
    unpack(flat, copies)
    assert torch.equal(copies[0], a)
    assert torch.equal(copies[1], b)


@pytest.mark.parametrize(
    ("cores", "device", "workers", "expected"),
    [
        (1, "cpu", None, (0, 1)),
        (8, "cpu", None, (2, 6)),
        (8, "cpu", 0, (0, 8)),
        (8, "cuda", None, (7, 1)),
        (64, "cuda", None, (16, 1)),
    ],
)  # fmt: skip
def test_cores_are_never_promised_twice(monkeypatch, cores, device, workers, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert share_cores(cores, torch.device(device), workers) == expected


@pytest.mark.parametrize("gpus", [True, False])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert [on_cpu(wanted) for wanted in ("cpu", "auto", "cuda")] == [True, not gpus, False]


def test_formats_and_devices_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        pick_autocast("fp16", torch.device("cpu"))
    assert pick_autocast("bf16", torch.device("cpu")) == torch.bfloat16
    assert pick_autocast("fp32", torch.device("cpu")) is None
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU"):
            pick_device("cuda", 0)


def test_the_name_of_a_sum_is_short_however_many_ranks_report():
    """Every rank sends it to one of them, each time. Stands in for Horovod, to read the name."""
    names = []

    class Recorded:
        Sum = None

        @staticmethod
        def allreduce(flat, name, op):
            names.append(name)
            return flat

    comm = object.__new__(HorovodComm)
    comm.hvd = Recorded
    for ranks in (1000, 1001):
        values = {f"busy.{r}": float(r) for r in range(ranks)}
        assert comm.sum(values) == values
    assert len(set(names)) == 2
    assert max(map(len, names)) < 80
