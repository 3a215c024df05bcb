"""The LARS law: golden vectors, trajectories against the oracle, and what must follow from the equations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_oracle import LarsOracle

from dist_lars.optim import LARS, fused

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lars_steps.json").read_text())["cases"]
LAWS_OF_FOUR = [(d, p) for d in ("norm_of_sum", "sum_of_norms") for p in ("inside", "outside")]
EXACT = {"eps": 0.0, "min_norm": 0.0}
# float64 always takes the multi-tensor path, the one of accelerators; dense float32 on the CPU takes the fused one.
PATHS = {"foreach": (torch.float64, 1e-12), "fused": (torch.float32, 3e-6)}


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    return values.to(dtype, copy=True)


def parameter(values: Any, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor(values, dtype))


def walk(opt: torch.optim.Optimizer, p: torch.Tensor, g: Any, lrs: list[float]) -> list[list[float]]:
    """Weights after each step with the constant gradient g."""
    steps = []
    for lr in lrs:
        opt.param_groups[0]["lr"] = lr
        p.grad = tensor(g, p.dtype)
        opt.step()
        steps.append(p.detach().double().tolist())
    return steps


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['case']}-{c['denominator']}-{c['lr_placement']}")
def test_golden_steps(case: dict[str, Any], path: str) -> None:
    dtype, tolerance = PATHS[path]
    p = parameter(case["w"], dtype)
    names = ("denominator", "lr_placement", "weight_decay", "trust_coefficient", "momentum")
    opt = LARS([p], lr=1.0, **EXACT, **{name: case[name] for name in names})
    np.testing.assert_allclose(walk(opt, p, case["g"], case["lr"]), case["steps"], rtol=tolerance)


def test_golden_cases_tell_all_four_laws_apart() -> None:
    last = {tuple(c["steps"][-1]) for c in GOLDEN if c["case"] == "non-collinear"}
    assert len(GOLDEN) == 8
    assert len(last) == 4


shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple), min_size=1, max_size=4)
options = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 5e-4, 0.1]),
        "trust_coefficient": st.sampled_from([0.001, 0.02]),
        "eps": st.sampled_from([0.0, 1e-9, 1e-3]),
        "min_norm": st.sampled_from([0.0, 1e-3, 0.5]),
        "denominator": st.sampled_from(["norm_of_sum", "sum_of_norms"]),
        "lr_placement": st.sampled_from(["inside", "outside"]),
        "nesterov": st.booleans(),
        "adapt": st.booleans(),
        "clip": st.booleans(),
        "maximize": st.booleans(),
    }
).filter(lambda o: not (o["nesterov"] and o["momentum"] == 0))


def trajectories(kinds: list[tuple[int, ...]], seed: int, keywords: dict[str, Any], dtype: torch.dtype) -> float:
    """Largest error over 12 steps with a changing rate, relative to the largest weight of the tensor so far."""
    rng = np.random.default_rng(seed)
    ps = [parameter(rng.normal(size=shape), dtype) for shape in kinds]
    oracles = [LarsOracle(p.detach().double().numpy(), **keywords) for p in ps]
    opt = LARS(ps, lr=1.0, **keywords)
    worst, sizes = 0.0, [np.abs(oracle.w).max() for oracle in oracles]
    for step in range(12):
        lr = 0.1 * (step + 1)
        opt.param_groups[0]["lr"] = lr
        for p, oracle in zip(ps, oracles, strict=True):
            p.grad = tensor(rng.normal(size=p.shape), dtype)
            oracle.step(p.grad.double().numpy(), lr)
        opt.step()
        sizes = [max(size, np.abs(oracle.w).max()) for size, oracle in zip(sizes, oracles, strict=True)]
        for p, oracle, size in zip(ps, oracles, sizes, strict=True):
            worst = max(worst, np.abs(p.detach().double().numpy() - oracle.w).max() / size)
    return worst


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), options)
def test_multi_tensor_path_equals_the_oracle(kinds: list[tuple[int, ...]], seed: int, keywords: dict[str, Any]) -> None:
    assert trajectories(kinds, seed, keywords, torch.float64) < 1e-12


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), options)
def test_fused_path_equals_the_oracle(kinds: list[tuple[int, ...]], seed: int, keywords: dict[str, Any]) -> None:
    assert trajectories(kinds, seed, keywords, torch.float32) < 5e-5


def test_both_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("_fused", "_foreach"):
        inner = getattr(LARS, name)
        monkeypatch.setattr(LARS, name, lambda *a, _n=name, _i=inner: taken.append(_n) or _i(*a))
    for dtype in (torch.float32, torch.float64):
        p = parameter([3.0, 4.0], dtype)
        walk(LARS([p], lr=1.0), p, [0.6, 0.8], [1.0])
    assert taken == ["_fused", "_foreach"]


@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
def test_large_layer_in_blocks_equals_the_oracle(monkeypatch: pytest.MonkeyPatch, denominator: str) -> None:
    monkeypatch.setattr(fused, "BLOCK", 64)
    monkeypatch.setattr(fused, "DOT", 100)
    assert trajectories([(3, 7, 31), (64,), (128,), (129,)], 1, {"denominator": denominator}, torch.float32) < 5e-5


@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
def test_norms_of_a_large_layer_are_accurate(denominator: str) -> None:
    """torch's own CPU norm is 1e-4 off at this size; ours must not be, on either path.

    The gradient is one spike, whose norm is exact, so that no error of the denominator can hide that of |w|.
    """
    w = np.random.default_rng(0).random(4_000_000, dtype=np.float32)
    g = np.zeros_like(w)
    g[0] = 1000.0
    exact_w, exact_g = w.astype(np.float64), g.astype(np.float64)
    parts = [exact_g + 1e-3 * exact_w] if denominator == "norm_of_sum" else [exact_g, 1e-3 * exact_w]
    true = 0.001 * np.linalg.norm(exact_w) / sum(np.linalg.norm(part) for part in parts)
    for nesterov in (False, True):
        p = parameter(w, torch.float32)
        opt = LARS([("w", p)], lr=1.0, weight_decay=1e-3, denominator=denominator, nesterov=nesterov, **EXACT)
        p.grad = tensor(g, p.dtype)
        opt.step()
        assert opt.trust_ratios()["w"] == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("rest", [1.0, 0.3, 0.11, 0.09, 1e-2, 1e-4])
@pytest.mark.parametrize("maximize", [False, True])
def test_norm_of_sum_keeps_its_digits_where_decay_balances_the_gradient(rest: float, maximize: bool) -> None:
    """The gradient is the decay's opposite up to `rest`, as at the end of a training."""
    w, noise = (torch.randn(300_000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    p = parameter(w, torch.float32)
    sign = -1.0 if maximize else 1.0
    opt = LARS([("w", p)], lr=1.0, weight_decay=0.1, maximize=maximize, **EXACT)
    p.grad = sign * 0.1 * (-w + rest * noise)
    true = 0.001 * w.double().norm() / (sign * p.grad.double() + 0.1 * w.double()).norm()
    # The sum itself, in float32, is all that anyone could know of it: eps / rest.
    opt.step()
    assert opt.trust_ratios()["w"] == pytest.approx(true.item(), rel=max(5e-6, 1e-7 / rest))


@pytest.mark.parametrize("gain", [1e-7, 1e-9, 1e-12, 1e-20])
def test_tiny_rates_keep_their_digits(gain: float) -> None:
    """The fused kernel takes the ratio as 1 - dampening, which would round a tiny one away."""
    p = parameter([3.0, 4.0], torch.float32)
    opt = LARS([p], lr=gain, adapt=False, weight_decay=0.1)
    walk(opt, p, [0.6, 0.8], [gain])
    np.testing.assert_allclose(opt.state[p]["momentum_buffer"].double() / gain, [0.9, 1.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("placement", "lrs"), [("inside", [0.1] * 5), ("outside", [0.1, 0.2, 0.3, 0.2, 0.1])], ids=["inside", "outside"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keywords", [{}, {"nesterov": True}, {"maximize": True}, {"momentum": 0.0}], ids=str)
def test_without_adaptation_it_is_torch_sgd(
    placement: str, lrs: list[float], dtype: torch.dtype, keywords: dict[str, Any]
) -> None:
    keywords = {"momentum": 0.9, "weight_decay": 0.01, **keywords}
    p, q = (
        parameter(torch.linspace(-1, 1, 24).view(4, 6), dtype),
        parameter(torch.linspace(-1, 1, 24).view(4, 6), dtype),
    )
    ours = LARS([p], lr=0.1, adapt=False, lr_placement=placement, **keywords)
    torchs = torch.optim.SGD([q], lr=0.1, **keywords)
    g = torch.linspace(-2, 3, 24).view(4, 6)
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(walk(ours, p, g, lrs), walk(torchs, q, g, lrs), rtol=rtol, atol=1e-12 + rtol)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from(LAWS_OF_FOUR), st.sampled_from([torch.float32, torch.float64]))
def test_without_decay_the_gradient_scale_does_not_matter(
    factor: float, law: tuple[str, str], dtype: torch.dtype
) -> None:
    paths = []
    for c in (1.0, factor):
        p = parameter([3.0, -4.0, 0.5], dtype)
        opt = LARS([p], lr=1.0, weight_decay=0.0, denominator=law[0], lr_placement=law[1], **EXACT)
        paths.append(walk(opt, p, [0.6 * c, 0.8 * c, -0.1 * c], [1.0, 2.0, 0.5]))
    np.testing.assert_allclose(*paths, rtol=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("law", LAWS_OF_FOUR, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_first_step_is_bounded_by_the_trust_region(law: tuple[str, str], dtype: torch.dtype) -> None:
    """|dw| <= lr trust |w|, with equality for the norm of the sum or without decay."""
    for weight_decay in (0.0, 0.1):
        p = parameter([3.0, 4.0], dtype)
        before = p.detach().clone()
        keywords = {"denominator": law[0], "lr_placement": law[1], "weight_decay": weight_decay}
        walk(LARS([p], lr=2.0, trust_coefficient=0.01, **EXACT, **keywords), p, [0.8, -0.6], [2.0])
        moved, bound = (p.detach() - before).norm().item(), 2.0 * 0.01 * 5.0
        equal = law[0] == "norm_of_sum" or weight_decay == 0.0
        assert moved == pytest.approx(bound, rel=1e-5) if equal else moved < bound * 0.95


@pytest.mark.parametrize("placement", ["inside", "outside"])
@pytest.mark.parametrize("lr", [0.5, 1e-3])
def test_clip_puts_the_smaller_of_rate_and_ratio_in_place_of_their_product(placement: str, lr: float) -> None:
    """local_lr is 0.05 / 1.5 = 1/30 here: below lr 0.5 it takes over, above lr 0.001 it does not."""
    p = parameter([3.0, 4.0])
    opt = LARS([p], lr=lr, weight_decay=0.1, trust_coefficient=0.01, clip=True, lr_placement=placement, **EXACT)
    step = np.array([3.0, 4.0]) - walk(opt, p, [0.6, 0.8], [lr])[0]
    np.testing.assert_allclose(step, min(lr, 1 / 30) * np.array([0.9, 1.2]), rtol=1e-11)


def test_order_of_groups_and_tensors_does_not_matter() -> None:
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        ps = [parameter(torch.linspace(1, 2, n), torch.float32) for n in (3, 5, 7)]
        opt = LARS([{"params": [ps[i]], "weight_decay": 0.1 * i} for i in order], lr=1.0)
        for p in ps:
            p.grad = torch.cos(p.detach())
        opt.step()
        results.append([p.detach().clone() for p in ps])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
