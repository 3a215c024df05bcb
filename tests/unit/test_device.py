"""What the trainer does on a GPU, seen by fake tensors: shapes and devices without numbers, so none can be read."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lars import engine
from dist_lars.comm import LocalComm
from dist_lars.config import Config
from dist_lars.data import transforms
from dist_lars.metrics import Counts
from dist_lars.optim import LARS
from dist_lars.plan import make_plan
from dist_lars.state import Progress, capture

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield
    transforms._mean_and_scale.cache_clear()  # fake ones must not meet a real GPU


class Crossings(TorchDispatchMode):
    """Shapes of the tensors that go from the host's memory to the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type == "cuda"]
        if given and set(given) == {"cpu"}:
            self.shapes += [tuple(t.shape) for t in made]
        return out


def job_of(**changes: Any) -> engine.Job:
    with CUDA:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    values = {
        "model": model,
        "optimizer": LARS(model.parameters(), lr=1.0),
        "comm": LocalComm(),
        "reducer": None,
        "plan": make_plan(Config(batch_size=8, micro_batch=4), 1, 64, 8),
        "device": CUDA,
        "autocast": None,
        "scaler": torch.amp.GradScaler("cuda", enabled=False),
        "seed": 0,
        "clip_norm": None,
    }
    return engine.Job(**{**values, **changes})


def stream() -> Iterator[engine.Batch]:
    while True:
        yield torch.empty(4, 8, 8, 3, dtype=torch.uint8), torch.empty(4, dtype=torch.int64)


def test_a_step_moves_its_images_to_the_gpu_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other copy from the host's memory, or number read back, would make the host wait for the GPU.

    Only the gradient norm is read, after the averaging that waits anyway.
    """
    monkeypatch.setattr(engine, "gradient_norm", lambda parameters: 1.0)
    job, batches_of = job_of(), stream()

    def backward(loss: torch.Tensor) -> None:  # autograd's own wants a real driver
        for p in job.model.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    engine.train_step(job, batches_of, 0, Counts(CUDA), engine.Clock())  # the first one also makes the constants
    with Crossings() as crossings:
        engine.train_step(job, batches_of, 1, Counts(CUDA), engine.Clock())
    assert crossings.shapes == 2 * [(4, 8, 8, 3), (4,)]


def test_what_ranks_tell_each_other_of_their_buffers_lies_on_no_gpu() -> None:
    """A pickled tensor returns to the GPU it came from, whoever reads it: each rank would open a context on all."""
    job, told = job_of(), {}

    class Listening(LocalComm):
        def gather(self, value: Any, name: str) -> list[Any]:
            told[name] = value
            return [value]

    counts = Counts(CUDA)
    counts.sums = np.zeros(4)  # its numbers are read
    capture(engine.Job(**{**vars(job), "comm": Listening()}), Config(), ("a",), Progress(), counts)
    tensors = [value for value in told.values() if isinstance(value, torch.Tensor)]
    assert [t.device.type for t in tensors] == ["cpu"]


def test_what_the_gpu_still_computes_is_a_ranks_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of its GPU: without a look at the queue a slow GPU would seem to wait for the others."""
    now = 0.0

    class Stream:
        def __init__(self, seconds: list[float]) -> None:
            self.seconds = seconds

        def synchronize(self) -> None:
            nonlocal now
            now += self.seconds.pop(0)

    stream = Stream([5.0, 2.0])  # its own backward, then the sums of all
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now)
    clock = engine.Clock()
    with clock.communicating(CUDA):
        now += 1.0
    lap = clock.lap()
    assert (lap.seconds, lap.communicated) == (8.0, 3.0)
    with clock.communicating(torch.device("cpu")):
        now += 1.0
    assert clock.lap().communicated == 1.0
