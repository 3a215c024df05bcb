"""LAMB: trajectories against the oracle, and what must follow from the equations."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_oracle import LambOracle

from dist_lars.optim import LAMB

DTYPES = [torch.float64, torch.float32]


def parameter(values: Any, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype))


shapes = st.lists(st.lists(st.integers(1, 5), max_size=4).map(tuple), min_size=1, max_size=4)
options = st.fixed_dictionaries(
    {
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)]),
        "eps": st.sampled_from([1e-6, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
        "adapt": st.booleans(),
        "maximize": st.booleans(),
    }
)


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), options, st.sampled_from(DTYPES))
def test_twelve_steps_equal_the_oracle(
    kinds: list[tuple[int, ...]], seed: int, keywords: dict[str, Any], dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    ps = [parameter(rng.normal(size=shape), dtype) for shape in kinds]
    oracles = [LambOracle(p.detach().double().numpy(), **keywords) for p in ps]
    opt = LAMB(ps, lr=1.0, **keywords)
    for step in range(12):
        opt.param_groups[0]["lr"] = lr = 0.01 * (step + 1)
        for p, oracle in zip(ps, oracles, strict=True):
            p.grad = torch.from_numpy(np.array(rng.normal(size=p.shape))).to(dtype)
            oracle.step(p.grad.double().numpy(), lr)
        opt.step()
    for p, oracle in zip(ps, oracles, strict=True):
        tolerance = 1e-11 if dtype == torch.float64 else 1e-3
        np.testing.assert_allclose(p.detach().double(), oracle.w, rtol=tolerance, atol=tolerance)


def test_first_step_by_hand() -> None:
    """Bias correction makes the first direction sign(g): u = (1, -1) + 0.1 (3, 4), moved by |w| / |u|."""
    p = parameter([3.0, 4.0])
    opt = LAMB([("p", p)], lr=0.1, eps=0.0, weight_decay=0.1)
    p.grad = torch.tensor([1e-3, -2e3], dtype=torch.float64)
    opt.step()
    u = np.array([1.3, -0.6])
    assert opt.trust_ratios()["p"] == pytest.approx(5.0 / np.linalg.norm(u), rel=1e-12)
    np.testing.assert_allclose(p.detach(), np.array([3.0, 4.0]) - 0.1 * 5.0 / np.linalg.norm(u) * u, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_step_has_the_length_of_the_weights_times_the_rate(dtype: torch.dtype) -> None:
    p = parameter([3.0, 4.0, -1.0], dtype)
    opt = LAMB([p], lr=0.01)
    for step in range(4):
        before = p.detach().clone()
        p.grad = torch.cos(before * step + 1)
        opt.step()
        assert (p.detach() - before).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-4)


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("g", [0.0, 1.0])
def test_zero_weights_and_zero_gradients_stay_finite_and_are_not_frozen(w: float, g: float) -> None:
    p = parameter([w, w])
    opt = LAMB([("p", p)], lr=0.1, weight_decay=0.0)
    p.grad = torch.full_like(p, g)
    opt.step()
    assert torch.isfinite(p).all()
    assert (p.detach() != w).all().item() == (g != 0.0)
    assert opt.trust_ratios()["p"] == (1.0 if w == 0.0 or g == 0.0 else pytest.approx(1.0, rel=1e-5))


def test_without_adaptation_and_decay_it_is_adam() -> None:
    p, q = parameter([3.0, 4.0]), parameter([3.0, 4.0])
    ours, torchs = LAMB([p], lr=0.1, eps=1e-8, weight_decay=0.0, adapt=False), torch.optim.Adam([q], lr=0.1, eps=1e-8)
    for step in range(4):
        p.grad = torch.cos(p.detach() + step)
        q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-12)


def test_state_and_groups_survive_saving_and_the_rebuild() -> None:
    results = []
    for interrupted in (False, True):
        p = parameter([3.0, 4.0])
        opt = LAMB([("p", p)], lr=0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.5)
        for step in range(4):
            if interrupted and step == 2:
                saved = opt.state_dict()
                opt = type(opt)(opt.param_groups)
                opt.load_state_dict(saved)
            p.grad = torch.cos(p.detach() + step)
            opt.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_parameters_without_gradient_keep_their_own_step_count() -> None:
    p, q = parameter([3.0]), parameter([3.0])
    opt = LAMB([p, q], lr=0.1)
    p.grad = torch.ones_like(p)
    opt.step()
    q.grad = torch.ones_like(q)
    opt.step()
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (2, 1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"betas": (0.9, 1.0)}, "betas are"), ({"eps": -1.0}, "eps is -1.0"), ({"lr": -1.0}, "lr is -1.0")],
)
def test_wrong_options_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAMB([parameter([1.0])], **{"lr": 1.0, **keywords})


def test_learning_rate_is_required_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="lr"):
        LAMB([parameter([1.0])])
    layer = torch.nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="LAMB: words has a sparse gradient"):
        LAMB([("words", layer.weight)], lr=1.0).step()


def test_closure() -> None:
    p = parameter([3.0, 4.0])
    opt = LAMB([p], lr=0.1)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 25.0
