"""The reducer by itself, with a stand-in for the other ranks: layouts, passes, missing gradients, order."""

import pytest
import torch
from torch import nn

from dist_lars.reducer import Reducer


class OtherRanks:
    """Stands in for Horovod: halves every bucket, as averaging with an idle rank would, and remembers the order."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def start(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        self.started.append(name)
        return flat

    def wait(self, flat: torch.Tensor) -> None:
        flat.mul_(0.5)


def reducer_of(model: nn.Module, bucket_mb: float = 1.0) -> tuple[Reducer, OtherRanks]:
    others = OtherRanks()
    return Reducer(model.parameters(), others.start, others.wait, bucket_mb), others


def test_passes_accumulate_and_the_last_one_starts_the_sums():
    model = nn.Linear(4, 2)
    reducer, others = reducer_of(model)
    x = torch.randn(3, 4)
    for _ in range(2):  # two steps: the first one's gradients must not linger
        reducer.begin()
        for i in range(3):
            reducer.last_pass = i == 2
            assert others.started == []
            model(x).sum().backward()
        reducer.finish()
        assert others.started == [b.name for b in reducer.buckets]
        others.started.clear()
        expected = 3 * x.sum(0).expand(2, 4) / 2
        torch.testing.assert_close(model.weight.grad, expected)


def test_gradients_have_the_layout_of_their_parameters():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    reducer, _ = reducer_of(model)
    reducer.begin()
    reducer.last_pass = True
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    reducer.finish()
    assert model.weight.grad.stride() == model.weight.stride()
    assert model.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_parameter_without_gradient_counts_as_zero():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    reducer, others = reducer_of(model)
    for use_both in (True, False):
        reducer.begin()
        reducer.last_pass = True
        out = model["used"](torch.ones(1, 2))
        (out + model["idle"](torch.ones(1, 2)) if use_both else out).sum().backward()
        reducer.finish()
    assert torch.equal(model["idle"].weight.grad, torch.zeros(2, 2))
    assert torch.equal(model["used"].weight.grad, torch.full((2, 2), 0.5))
    assert len(others.started) == 2 * len(reducer.buckets)


@pytest.mark.parametrize("bucket_mb", [1e-5, 1e-3, 1.0])
def test_buckets_cover_every_parameter_once_from_the_last_backwards(bucket_mb):
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30).double(), nn.Linear(30, 5))
    model[0].bias.requires_grad_(False)
    reducer, _ = reducer_of(model, bucket_mb)
    listed = [id(p) for bucket in reducer.buckets for p in bucket.parameters]
    assert listed == [id(p) for p in reversed(list(model.parameters())) if p.requires_grad]
    for bucket in reducer.buckets:
        assert len({p.dtype for p in bucket.parameters}) == 1
        assert len(bucket.parameters) == 1 or bucket.flat.numel() * bucket.flat.element_size() <= bucket_mb * 1e6


def test_the_first_bucket_is_small_so_that_it_starts_early():
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(10)])
    reducer, _ = reducer_of(model, 0.2)
    sizes = [bucket.flat.numel() * 4 for bucket in reducer.buckets]
    assert sizes[0] <= 0.1 * max(sizes) + 41_000
    assert sizes[0] < sizes[1]
