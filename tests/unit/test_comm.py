"""Who counts the ranks, and what happens when the launcher and Horovod disagree."""

import pytest
import torch

from dist_lars.comm import LocalComm, averaged_buffers, check_ranks, on_first_rank, pack, unpack
from dist_lars.errors import UserError
from dist_lars.resources import pick_autocast, pick_device, share_cores


def test_tasks_that_are_separate_jobs_are_stopped():
    check_ranks(4, 4, "OMPI_COMM_WORLD_SIZE")
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS=64 .* Horovod sees 1 .*separate jobs.*--mpi=pmix"):
        check_ranks(1, 64, "SLURM_STEP_NUM_TASKS")


def test_an_error_on_the_first_rank_is_everyones():
    def refuse():
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        on_first_rank(LocalComm(), refuse, "test")
    assert on_first_rank(LocalComm(), lambda: 3, "test") == 3


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


def test_formats_and_devices_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        pick_autocast("fp16", torch.device("cpu"))
    assert pick_autocast("bf16", torch.device("cpu")) == torch.bfloat16
    assert pick_autocast("fp32", torch.device("cpu")) is None
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU"):
            pick_device("cuda", 0)
