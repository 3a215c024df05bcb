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
    return Reducer(model.parameters(), others.start, others.wait, 2, bucket_mb), others


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


def test_buckets_start_in_the_same_order_whatever_arrives_first():
    """torch.distributed pairs all-reduces by their order, and ranks need not fill their buckets in the same one."""
    model = nn.ModuleList([nn.Linear(30, 30) for _ in range(3)])
    reducer, others = reducer_of(model, 0.003)
    x = torch.ones(1, 30)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        reducer.begin()
        reducer.last_pass = True
        for i in order:
            model[i](x).sum().backward()
        reducer.finish()
        assert others.started == [b.name for b in reducer.buckets]
        assert len(others.started) > 2
        others.started.clear()


def test_a_large_gradient_is_sent_from_where_it_lies():
    """No copy, no second buffer; passes accumulate, and the layout is the parameter's."""
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Conv2d(8, 16, 3, bias=False).to(memory_format=layout)
        reducer, _ = reducer_of(model, 0.001)
        sent: list[torch.Tensor] = []
        reducer.start = lambda flat, name, sent=sent: (sent.append(flat), flat)[1]
        reducer.begin()
        x = torch.randn(2, 8, 6, 6).to(memory_format=layout)
        for last in (False, True):
            reducer.last_pass = last
            model(x).square().sum().backward()
        before = model.weight.grad.clone()
        reducer.finish()
        assert sent[0].data_ptr() == model.weight.grad.data_ptr()
        assert sent[0].shape == (model.weight.numel(),)
        assert all(bucket.flat is None for bucket in reducer.buckets)
        assert model.weight.grad.stride() == model.weight.stride()
        torch.testing.assert_close(model.weight.grad, before / 2)


@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16])
def test_the_wires_format_is_that_of_what_travels_alone(wire):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3).double())
    reducer, _ = reducer_of(model, 0.001)
    sent = []
    reducer.wire = wire
    reducer.start = lambda flat, name: (sent.append(flat.dtype), flat)[1]
    reducer.begin()
    reducer.last_pass = True
    model[1](model[0](torch.randn(4, 20)).double()).sum().backward()
    exact = model[0].weight.grad.clone()
    reducer.finish()
    assert set(sent) == {wire, torch.float64}  # only float32 is made smaller
    assert model[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(model[0].weight.grad, exact.to(wire).float() / 2)
