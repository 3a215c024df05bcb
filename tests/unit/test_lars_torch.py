"""LARS as a citizen of torch: devices, layouts, dtypes, state, groups, loss scaling, Horovod's rebuild."""

import copy
import inspect
import io
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from optim_oracle import LarsOracle
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lars.optim import LAMB, LARS, build, fused

DTYPES = [torch.float64, torch.float32]
both_paths = pytest.mark.parametrize("dtype", DTYPES, ids=["foreach", "fused"])


def net(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 5)]
    return torch.nn.Sequential(*layers).to(dtype)


def train(model: torch.nn.Module, opt: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        dtype = next(model.parameters()).dtype
        model(torch.randn(6, 3, 4, 4, generator=generator).to(dtype)).square().mean().backward()
        opt.step()


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def values(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


# Fake tensors: shapes and dtypes of a CUDA device that is not there. Reading a value back raises.


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode():
        yield


def fake_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    ps = [torch.nn.Parameter(torch.empty(s, device="cuda", dtype=dtype)) for s in ((4, 3, 3, 3), (4,), (5, 16), (5,))]
    for p in ps:
        p.grad = torch.empty_like(p)
    return ps


def test_fake_cuda_refuses_to_read_back(fake_cuda: None) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.empty(1, device="cuda").item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"denominator": "sum_of_norms"},
        {"lr_placement": "outside"},
        {"clip": True},
        {"nesterov": True},
        {"maximize": True},
        {"momentum": 0.0},
        {"adapt": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "grad_scale"])
def test_step_on_cuda_reads_nothing_back(
    fake_cuda: None, keywords: dict[str, Any], dtype: torch.dtype, scaled: bool
) -> None:
    ps = fake_parameters(dtype)
    opt = LARS(ps, lr=1.0, **keywords)
    if scaled:
        opt.grad_scale = torch.empty((), device="cuda")
        opt.found_inf = torch.empty((), device="cuda")
    for _ in range(2):
        opt.step()
    assert all(p.device.type == "cuda" for p in ps)


@pytest.mark.parametrize("lr_device", ["cpu", "cuda"])
def test_step_on_cuda_with_the_rate_in_a_tensor_reads_nothing_back(fake_cuda: None, lr_device: str) -> None:
    for keywords in ({}, {"lr_placement": "outside"}, {"adapt": False}, {"clip": True}):
        ps = fake_parameters(torch.float32)
        LARS(ps, lr=torch.empty((), device=lr_device), **keywords).step()  # reading back raises
        assert all(p.device.type == "cuda" for p in ps)


@pytest.mark.parametrize("adapt", [False, True])
def test_lamb_on_cuda_reads_nothing_back(fake_cuda: None, adapt: bool) -> None:
    ps = fake_parameters(torch.float32)
    opt = LAMB(ps, lr=1.0, adapt=adapt)
    for _ in range(2):
        opt.step()
    assert all(p.device.type == "cuda" for p in ps)


# Layouts and dtypes.


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    base = torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 1),
        "with gaps": torch.cat([base, base], dim=-1)[..., ::2],
        "scalar": torch.tensor(2.0, dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }


@both_paths
@pytest.mark.parametrize("grad_layout", ["same", "contiguous"])
@pytest.mark.parametrize("kind", layouts(torch.float32))
@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
def test_any_layout_equals_the_oracle(dtype: torch.dtype, kind: str, grad_layout: str, denominator: str) -> None:
    p = torch.nn.Parameter(layouts(dtype)[kind].clone(memory_format=torch.preserve_format))
    if kind == "with gaps":
        p = torch.nn.Parameter(layouts(dtype)[kind])
        assert not p.is_contiguous()
    oracle = LarsOracle(p.detach().double().numpy(), denominator=denominator)
    opt = LARS([p], lr=1.0, denominator=denominator)
    for step in range(3):
        p.grad = torch.cos(p.detach() + step)
        if grad_layout == "contiguous":
            p.grad = p.grad.contiguous()
        oracle.step(p.grad.double().numpy(), 1.0)
        opt.step()
    np.testing.assert_allclose(p.detach().double(), oracle.w, rtol=1e-12 if dtype == torch.float64 else 1e-5)
    if kind in ("contiguous", "channels_last"):
        assert opt.state[p]["momentum_buffer"].stride() == p.stride()


@both_paths
def test_momentum_follows_a_model_that_changes_its_memory_format(dtype: torch.dtype) -> None:
    results = []
    for late in (False, True):
        model = net(dtype)
        opt = LARS(model.parameters(), lr=1.0)
        train(model, opt)
        if late:
            model.to(memory_format=torch.channels_last)
        train(model, opt, seed=1)
        results.append(weights(model))
        buffer = opt.state[model[0].weight]["momentum_buffer"]
        assert buffer.is_contiguous(memory_format=torch.channels_last) is late
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@both_paths
def test_gradients_may_be_views_into_one_flat_bucket(dtype: torch.dtype) -> None:
    results = []
    for bucketed in (False, True):
        model = net(dtype)
        ps = list(model.parameters())
        if bucketed:
            bucket = torch.zeros(sum(p.numel() for p in ps), dtype=dtype)
            for p, piece in zip(ps, bucket.split([p.numel() for p in ps]), strict=True):
                p.grad = piece.view_as(p)
        opt = LARS(ps, lr=1.0)
        for step in range(3):
            for p in ps:
                g = torch.cos(p.detach() + step)
                p.grad = p.grad.copy_(g) if bucketed else g
            opt.step()
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("weights_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("images_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_parameter_of_a_network_takes_the_fast_path(weights_format: Any, images_format: Any) -> None:
    model = torchvision.models.resnet18(num_classes=5).to(memory_format=weights_format)
    model(torch.randn(2, 3, 32, 32).to(memory_format=images_format)).sum().backward()
    assert all(fused.suits_kind(p) and fused.suits_layout(p, p.grad) for p in model.parameters())


@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
def test_steps_do_not_depend_on_where_tensors_lie_in_memory(denominator: str) -> None:
    """Replicas must take the same step to the last bit, and a vector kernel may start differently on each address."""
    n, results = 150_001, []
    w, g = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for offset in range(17):
        p = torch.nn.Parameter(torch.empty(n + 32)[offset : offset + n].copy_(w))
        p.grad = torch.empty(n + 32)[2 * offset : 2 * offset + n].copy_(g) if offset < 16 else g
        LARS([p], lr=1.0, denominator=denominator).step()
        results.append(p.detach().clone())
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
def test_half_precision_takes_its_norms_in_float32(dtype: torch.dtype, denominator: str) -> None:
    """The squares of these gradients overflow float16, and bfloat16 cannot add 1 to 256."""
    w, g = torch.full((4096,), 0.5, dtype=dtype), torch.full((4096,), 300.0, dtype=dtype)
    p = torch.nn.Parameter(w)
    opt = LARS([("p", p)], lr=1.0, weight_decay=0.0, denominator=denominator)
    p.grad = g
    opt.step()
    assert opt.trust_ratios()["p"] == pytest.approx(0.001 * 0.5 / 300.0, rel=1e-6)
    assert opt.state[p]["momentum_buffer"].dtype == dtype


@both_paths
@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("g", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("law", ["default", "paper", "mlperf", "outside", "larc"])
def test_zero_weights_and_zero_gradients_stay_finite(
    dtype: torch.dtype, w: float, g: float, weight_decay: float, law: str
) -> None:
    p = torch.nn.Parameter(torch.full((3,), w, dtype=dtype))
    opt = build("lars", [{"params": [p], "param_names": ["p"]}], lr=1.0, law=law, eps=0.0, weight_decay=weight_decay)
    for _ in range(3):
        p.grad = torch.full_like(p, g)
        opt.step()
    assert torch.isfinite(p).all()
    assert np.isfinite(list(opt.trust_ratios().values())).all()


# State and groups.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_saving_and_loading_mid_run_changes_nothing(dtype: torch.dtype) -> None:
    whole, first = net(dtype), net(dtype)
    opt = LARS(whole.named_parameters(), lr=1.0)
    train(whole, opt)
    train(whole, opt, seed=1)

    opt = LARS(first.named_parameters(), lr=1.0)
    train(first, opt)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = net(dtype)
    second.load_state_dict(saved["model"])
    opt = LARS(second.named_parameters(), lr=5.0)
    opt.load_state_dict(saved["optimizer"])
    train(second, opt, seed=1)
    assert torch.equal(weights(whole), weights(second))


@both_paths
def test_rebuilt_from_its_groups_it_is_the_same(dtype: torch.dtype) -> None:
    """Horovod's DistributedOptimizer calls the class with the groups and nothing else."""
    options = {"momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.02, "eps": 0.5, "min_norm": 0.25}
    options |= {"denominator": "sum_of_norms", "lr_placement": "outside", "nesterov": True, "clip": True}
    results = []
    for rebuild in (False, True):
        model = net(dtype)
        opt = LARS(model.named_parameters(), lr=3.0, **options)
        before = values(opt)
        if rebuild:
            opt = type(opt)(opt.param_groups)
        assert values(opt) == before
        assert {k: before[0][k] for k in options} == options
        assert before[0]["param_names"][0] == "0.weight"
        train(model, opt)
        results.append(weights(model))
    assert torch.equal(*results)


def test_added_group_takes_the_defaults_and_its_own_values() -> None:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = LARS([p], lr=2.0, trust_coefficient=0.02)
    opt.add_param_group({"params": [q], "adapt": False, "weight_decay": 0.0})
    assert opt.param_groups[1]["trust_coefficient"] == 0.02
    assert (opt.param_groups[1]["adapt"], opt.param_groups[1]["weight_decay"]) == (False, 0.0)
    q.grad = torch.ones(2)
    opt.step()
    assert p.tolist() == [1.0, 1.0]  # no gradient: untouched, not decayed
    assert q.tolist() == [-1.0, -1.0]


def test_momentum_is_allocated_with_the_group() -> None:
    """So that Horovod's broadcast of the optimizer state has no reason to take a blind step."""
    opt = LARS(net().parameters(), lr=1.0)
    assert all(torch.count_nonzero(s["momentum_buffer"]) == 0 for s in opt.state.values())
    assert len(opt.state) == 6


def test_momentum_may_be_switched_on_later() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = LARS([p], lr=1.0, momentum=0.0)
    opt.param_groups[0]["momentum"] = 0.9
    p.grad = torch.ones(2)
    opt.step()
    assert "momentum_buffer" in opt.state[p]


@both_paths
def test_rate_may_be_a_tensor(dtype: torch.dtype) -> None:
    for keywords in ({}, {"lr_placement": "outside"}, {"clip": True}, {"adapt": False}):
        results = []
        for lr in (0.5, torch.tensor(0.5)):
            model = net(dtype)
            train(model, LARS(model.parameters(), lr=lr, **keywords))
            results.append(weights(model))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_a_debugger_that_looks_at_the_locals_changes_nothing() -> None:
    """Under Python 3.12 what it reads grows the mapping of a frame's locals."""

    def look(frame: Any, event: str, arg: Any) -> Any:
        frame.f_locals  # noqa: B018  as coverage and pdb do
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        opt = LARS([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    finally:
        sys.settrace(before)
    assert opt.defaults["lr"] == 0.5
    assert set(opt.defaults) <= set(inspect.signature(LARS.__init__).parameters) - {"self", "params"}


def test_copied_and_pickled_optimizers_go_on() -> None:
    model = net()
    opt = LARS(model.parameters(), lr=1.0)
    train(model, opt, steps=1)
    twin = copy.deepcopy(opt)
    assert twin.trust_ratios() == {}
    twin.step()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"denominator": "sum"}, "denominator is 'sum'; known: norm_of_sum, sum_of_norms"),
        ({"lr_placement": "in"}, "lr_placement is 'in'; known: inside, outside"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
    ],
)
def test_wrong_options_are_refused_in_constructor_and_group(keywords: dict[str, Any], message: str) -> None:
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=message):
        LARS([p], **{"lr": 1.0, **keywords})
    opt = LARS([p], lr=1.0)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [q], **keywords})
    assert len(opt.param_groups) == 1


# Ratios.


def test_trust_ratios_by_name_without_the_groups_that_are_not_adapted() -> None:
    model = net()
    names = dict(model.named_parameters())
    groups = [
        {"params": [("0.weight", names["0.weight"]), ("3.weight", names["3.weight"])]},
        {"params": [("3.bias", names["3.bias"])], "adapt": False},
    ]
    opt = LARS(groups, lr=1.0)
    assert opt.trust_ratios() == {}
    train(model, opt, steps=1)
    expected = {}
    twin = net()
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), steps=1)
    for name, p in twin.named_parameters():
        expected[name] = 0.001 * p.norm().item() / (p.grad + 5e-4 * p).norm().item()
    assert opt.trust_ratios() == pytest.approx({k: expected[k] for k in ("0.weight", "3.weight")}, rel=1e-5)


def test_trust_ratios_without_names_go_by_group_and_place() -> None:
    model = net()
    ps = list(model.parameters())
    opt = LARS([{"params": ps[:2]}, {"params": ps[2:]}], lr=1.0)
    train(model, opt, steps=1)
    assert list(opt.trust_ratios()) == ["group0.0", "group0.1", "group1.0", "group1.1", "group1.2", "group1.3"]


# Loss scaling.


@both_paths
@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
@pytest.mark.parametrize("keywords", [{}, {"law": "paper"}, {"law": "larc"}, {"nesterov": True}], ids=str)
def test_loss_scale_changes_nothing(dtype: torch.dtype, optimizer: str, keywords: dict[str, Any]) -> None:
    """A power of two: the unscaled gradients are the same numbers, so the norms and the decay must be, too."""
    results = []
    for enabled in (False, True):
        model = net(dtype)
        opt = build(optimizer, [{"params": list(model.parameters())}], lr=0.5, weight_decay=0.1, **keywords)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for step in range(3):
            opt.zero_grad()
            x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
            scaler.scale(model(x).square().mean()).backward()
            before = [p.grad.clone() for p in model.parameters()]
            scaler.step(opt)
            if optimizer == "lars":
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
            scaler.update()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-7)


@both_paths
@pytest.mark.parametrize("keywords", [{}, {"nesterov": True}, {"momentum": 0.0}, {"lr_placement": "outside"}], ids=str)
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("unscaled_first", [False, True])
def test_overflow_changes_neither_weights_nor_momentum(
    dtype: torch.dtype, keywords: dict[str, Any], poison: float, unscaled_first: bool
) -> None:
    model = net(dtype)
    opt = LARS(model.parameters(), lr=1.0, **keywords)
    train(model, opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    buffers = [s["momentum_buffer"].clone() for s in opt.state.values() if s]
    before = weights(model)
    next(model.parameters()).grad[0] = poison
    if unscaled_first:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert torch.equal(weights(model), before)
    assert all(torch.equal(s["momentum_buffer"], b) for s, b in zip(opt.state.values(), buffers, strict=False))
    assert scaler.get_scale() == 4.0


# Compiled models, memory.


def test_compiled_model_trains_the_same() -> None:
    results = []
    for compiled in (False, True):
        model = net()
        opt = LARS(model.named_parameters(), lr=1.0)
        train(torch.compile(model, backend="aot_eager") if compiled else model, opt)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class Allocations(TorchDispatchMode):
    """The largest number of bytes that new tensors held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self._hold(t.untyped_storage().nbytes(), t)
        return out

    def _hold(self, size: int, t: torch.Tensor) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(t, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def test_allocations_are_seen() -> None:
    with Allocations() as memory:
        x = torch.zeros(1000)
        del x
        y = torch.zeros(500) + 1.0
    assert memory.peak == 4000
    assert memory.now == y.numel() * 4


@both_paths
@pytest.mark.parametrize(
    "keywords", [{}, {"denominator": "sum_of_norms"}, {"nesterov": True}, {"adapt": False}], ids=str
)
@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_temporaries_are_at_most_one_largest_layer(
    dtype: torch.dtype, keywords: dict[str, Any], optimizer: Any
) -> None:
    if optimizer is LAMB:
        keywords = {k: v for k, v in keywords.items() if k == "adapt"}
    ps = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (200_000, 150_000, 100_000, 100_000, 50_000, 10)]
    opt = optimizer(ps, lr=1.0, **keywords)
    for p in ps:
        p.grad = torch.randn_like(p)
    opt.step()
    with Allocations() as memory:
        opt.step()
    largest = max(p.numel() * p.element_size() for p in ps)
    assert memory.peak <= largest + 20_000
