"""One test per known defect of a public LARS, named after where it was seen."""

import inspect
import io
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from optim_oracle import LarsOracle
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_lars.optim import LAMB, LARS, LAWS, build, param_groups

DTYPES = [torch.float64, torch.float32]  # the multi-tensor path and the fused one
both_paths = pytest.mark.parametrize("dtype", DTYPES, ids=["foreach", "fused"])


def parameter(values: Any, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def stepped(p: torch.nn.Parameter, g: Any, steps: int = 1, **keywords: Any) -> LARS:
    opt = LARS([("p", p)], **{"lr": 1.0, **keywords})
    for _ in range(steps):
        p.grad = torch.tensor(g, dtype=p.dtype)
        opt.step()
    return opt


@both_paths
def test_mlcommons_tf2_eps_of_zero_stays_zero(dtype: torch.dtype) -> None:
    """There 0 is falsy and becomes Keras' 1e-7, which is not small beside a tiny gradient."""
    opt = stepped(parameter([3.0, 4.0], dtype), [6e-9, 8e-9], eps=0.0, weight_decay=0.0)
    assert opt.trust_ratios()["p"] == pytest.approx(0.001 * 5 / 1e-8, rel=1e-5)
    opt = build("lars", [{"params": [parameter([3.0, 4.0])]}], lr=1.0, law="default", eps=0.0)
    assert opt.param_groups[0]["eps"] == 0.0


@both_paths
def test_mxnet_three_steps_with_defaults(dtype: torch.dtype) -> None:
    """There the second step with the default arguments is a TypeError."""
    p, oracle = parameter([3.0, 4.0], dtype), LarsOracle(np.array([3.0, 4.0]))
    stepped(p, [0.8, -0.6], steps=3)
    for _ in range(3):
        oracle.step(np.array([0.8, -0.6]), 1.0)
    np.testing.assert_allclose(p.detach().double(), oracle.w, rtol=1e-12 if dtype == torch.float64 else 1e-6)


@both_paths
@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
def test_paddle_timm_bolts_decay_of_zero_keeps_the_adaptation(dtype: torch.dtype, denominator: str) -> None:
    opt = stepped(parameter([3.0, 4.0], dtype), [0.6, 0.8], weight_decay=0.0, denominator=denominator)
    assert opt.trust_ratios()["p"] == pytest.approx(0.005, rel=1e-6)


def test_tensorflow_models_kozistr_sparse_gradients_are_refused_by_name() -> None:
    layer, dense = torch.nn.Embedding(5, 3, sparse=True), parameter([1.0])
    opt = LARS([("dense", dense), ("words.weight", layer.weight)], lr=1.0)
    (layer(torch.tensor([1, 2])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match=r"words\.weight has a sparse gradient"):
        opt.step()
    assert dense.item() == 1.0  # refused before anything moved


def test_optax_docstring_says_what_is_adapted_by_default() -> None:
    assert "Nothing is excluded by default: BatchNorm and biases are adapted and decayed" in _one_line(LARS.__doc__)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    assert [(len(g["params"]), g["adapt"], g["weight_decay"]) for g in param_groups(net, weight_decay=0.5)] == [
        (4, True, 0.5)
    ]


@both_paths
def test_tinygrad_idea_equals_the_mlperf_reference(dtype: torch.dtype) -> None:
    """The rule of MLPerf's reference, written out from its description: excluded tensors take the raw rate."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(dtype)
    law = LAWS["mlperf"]
    groups = param_groups(
        net,
        weight_decay=2e-4,
        exclude_from_adaptation=law.exclude_from_adaptation,
        exclude_from_decay=law.exclude_from_decay,
    )
    opt = build("lars", groups, lr=17.0, law="mlperf")
    expected = {n: p.detach().double().numpy().copy() for n, p in net.named_parameters()}
    velocity = {n: np.zeros_like(w) for n, w in expected.items()}
    for lr in (1.0, 9.0, 17.0):
        for group in opt.param_groups:
            group["lr"] = lr
        for name, p in net.named_parameters():
            p.grad = torch.cos(p.detach() + len(name))
            w, g, reference_only = expected[name], p.grad.double().numpy(), name == "0.weight"
            trust = 1.0
            if reference_only:
                w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
                trust = 0.001 * w_norm / (g_norm + 2e-4 * w_norm)
                g = g + 2e-4 * w
            velocity[name] = 0.9 * velocity[name] - lr * trust * g
            expected[name] = w + velocity[name]
        opt.step()
    for name, p in net.named_parameters():
        np.testing.assert_allclose(p.detach(), expected[name], rtol=1e-12 if dtype == torch.float64 else 1e-5)


def test_apex_larc_exception_leaves_the_decay_in_the_groups() -> None:
    """There the decay is taken out of the groups during the step and lost when it raises."""
    p = parameter([3.0, 4.0])
    opt = LARS([p], lr=1.0, weight_decay=0.1)
    before = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert {k: v for k, v in opt.param_groups[0].items() if k != "params"} == before
    assert p.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "keywords", [{}, {"nesterov": True}, {"maximize": True}, {"denominator": "sum_of_norms"}], ids=str
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_apex_kozistr_4uiiurz1_gradients_are_never_modified(keywords: dict[str, Any], dtype: torch.dtype) -> None:
    p = parameter([[3.0, 4.0], [1.0, 2.0]], dtype)
    g = torch.tensor([[0.8, -0.6], [0.1, 0.2]], dtype=dtype)
    opt = LARS([p], lr=1.0, weight_decay=0.1, **keywords)
    p.grad = g.clone()
    version = p.grad._version
    for _ in range(2):
        opt.step()
    assert torch.equal(p.grad, g)
    assert p.grad._version == version


def test_apex_lightning_is_an_optimizer_that_schedulers_take() -> None:
    p = parameter([3.0, 4.0])
    opt = LARS([p], lr=2.0)
    groups = opt.param_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0 / (k + 1))
    p.grad = torch.ones(2, dtype=p.dtype)
    opt.step()
    scheduler.step()
    assert opt.param_groups is groups  # whoever holds them sees the same ones
    assert opt.param_groups[0]["lr"] == 1.0


def test_apex_barlowtwins_moco_closure_works_with_gradients_enabled() -> None:
    p = parameter([3.0, 4.0])
    opt = LARS([p], lr=1.0)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 25.0
    assert p.detach().norm() < 5


def test_torchlars_options_survive_saving_and_loading() -> None:
    """There the saved state has neither eps nor the trust coefficient."""
    options = {"trust_coefficient": 0.02, "eps": 0.5, "min_norm": 0.25, "denominator": "sum_of_norms", "clip": True}
    saved = stepped(parameter([3.0, 4.0]), [0.6, 0.8], lr_placement="outside", **options)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = LARS([("p", parameter([1.0, 2.0]))], lr=9.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert {k: loaded.param_groups[0][k] for k in options} == options
    assert loaded.param_groups[0]["lr_placement"] == "outside"
    assert loaded.param_groups[0]["lr"] == 1.0


@both_paths
@pytest.mark.parametrize(("w", "ratio_one"), [([0.0, 0.0], True), ([3e-4, 4e-4], True), ([3e-3, 4e-3], False)], ids=str)
def test_bolts_solo_systemds_small_norm_keeps_decay_and_moves_at_the_raw_rate(
    dtype: torch.dtype, w: list[float], ratio_one: bool
) -> None:
    """v = lr (g + wd w) with ratio 1: neither the decay nor the tensor itself is dropped."""
    p = parameter(w, dtype)
    opt = stepped(p, [0.6, 0.8], weight_decay=0.5, lr=0.1)
    expected = 0.1 * (np.array([0.6, 0.8]) + 0.5 * np.array(w))
    if not ratio_one:
        expected *= 0.001 * 0.005 / (1.0 + 0.5 * 0.005)
    np.testing.assert_allclose(opt.state[p]["momentum_buffer"].double(), expected, rtol=1e-6)
    np.testing.assert_allclose(p.detach().double(), np.array(w) - expected, rtol=1e-5)


@both_paths
@pytest.mark.parametrize("denominator", ["norm_of_sum", "sum_of_norms"])
def test_bolts_solo_zero_gradient_keeps_the_decay(dtype: torch.dtype, denominator: str) -> None:
    p = parameter([3.0, 4.0], dtype)
    stepped(p, [0.0, 0.0], weight_decay=0.1, denominator=denominator, eps=0.0)
    rate = 1.0 if denominator == "sum_of_norms" else 0.001 * 5 / 0.5
    np.testing.assert_allclose(p.detach().double(), np.array([3.0, 4.0]) * (1 - rate * 0.1), rtol=1e-6)


def test_torch_optimizer_documented_values_are_the_actual_defaults() -> None:
    defaults = {k: v.default for k, v in inspect.signature(LARS).parameters.items()}
    expected = {"momentum": 0.9, "weight_decay": 5e-4, "trust_coefficient": 0.001, "eps": 1e-9, "min_norm": 1e-3}
    expected |= {
        "denominator": "norm_of_sum",
        "lr_placement": "inside",
        "nesterov": False,
        "adapt": True,
        "clip": False,
    }
    assert {k: defaults[k] for k in expected} == expected
    rows = re.findall(r"^ +(\w+) +``.*?`` +(inside|outside) +(\S+) +(\S+) ", LARS.__doc__, re.MULTILINE)
    table = {name: (placement, float(eps), float(min_norm)) for name, placement, eps, min_norm in rows}
    assert table == {name: (law.lr_placement, law.eps, law.min_norm) for name, law in LAWS.items()}
    assert table["default"] == (defaults["lr_placement"], defaults["eps"], defaults["min_norm"])


def test_barlowtwins_groups_hold_plain_values_only() -> None:
    net = torch.nn.Linear(2, 2)
    opt = build("lars", param_groups(net, weight_decay=0.1, exclude_from_decay="bn_bias"), lr=1.0)
    for group in opt.param_groups:
        assert json.loads(json.dumps({k: v for k, v in group.items() if k != "params"}))


@both_paths
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_nus_colossalai_nothing_is_clamped(dtype: torch.dtype, factor: float) -> None:
    """There gradients are clamped to 10 and ratios to 50 without a word."""
    p = parameter([3.0, 4.0], dtype)
    opt = stepped(p, [0.6 * factor, 0.8 * factor], weight_decay=0.0, eps=0.0, adapt=True)
    assert opt.trust_ratios()["p"] == pytest.approx(0.001 * 5 / factor, rel=1e-5)
    np.testing.assert_allclose(opt.state[p]["momentum_buffer"].double(), [0.003, 0.004], rtol=1e-5)


@both_paths
@pytest.mark.parametrize("nesterov", [False, True])
def test_kozistr_4uiiurz1_momentum_starts_from_the_adapted_gradient(dtype: torch.dtype, nesterov: bool) -> None:
    """There the first step is 184 times too large, or the first buffer 1.9 times the gradient."""
    torch.manual_seed(0)
    p = parameter(torch.randn(64, 64).tolist(), dtype)
    before = p.detach().clone()
    opt = stepped(p, torch.randn(64, 64).tolist(), weight_decay=0.0, nesterov=nesterov)
    step = 0.001 * before.norm().item()
    assert opt.state[p]["momentum_buffer"].norm().item() == pytest.approx(step, rel=1e-5)
    assert (p.detach() - before).norm().item() == pytest.approx(step * (1.9 if nesterov else 1.0), rel=1e-4)


@both_paths
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_bitsandbytes_momentum_of_zero_works(dtype: torch.dtype, placement: str) -> None:
    p, oracle = parameter([3.0, 4.0], dtype), LarsOracle(np.array([3.0, 4.0]), momentum=0.0, lr_placement=placement)
    opt = stepped(p, [0.8, -0.6], steps=2, momentum=0.0, lr_placement=placement)
    for _ in range(2):
        oracle.step(np.array([0.8, -0.6]), 1.0)
    np.testing.assert_allclose(p.detach().double(), oracle.w, rtol=1e-6)
    assert not opt.state[p]


@both_paths
@pytest.mark.parametrize("min_norm", [1e-3, 0.0])
def test_bitsandbytes_noahgolmant_tensors_that_start_at_zero_are_not_frozen(
    dtype: torch.dtype, min_norm: float
) -> None:
    p = parameter([0.0, 0.0], dtype)
    stepped(p, [0.6, 0.8], lr=0.1, min_norm=min_norm)
    np.testing.assert_allclose(p.detach().double(), [-0.06, -0.08], rtol=1e-6)


@both_paths
def test_bitsandbytes_ratio_scales_up_as_well_as_down(dtype: torch.dtype) -> None:
    opt = stepped(parameter([3.0, 4.0], dtype), [6e-4, 8e-4], weight_decay=0.0)
    assert opt.trust_ratios()["p"] == pytest.approx(5.0, rel=1e-5)


@both_paths
@pytest.mark.parametrize("law", LAWS)
def test_noahgolmant_rate_comes_from_outside_and_may_be_zero(dtype: torch.dtype, law: str) -> None:
    """There an epoch is counted per step and the rate reaches 0 at 200; here no step count exists."""
    p = parameter([3.0, 4.0], dtype)
    opt = build("lars", [{"params": [p]}], lr=0.0, law=law, weight_decay=0.1)
    for _ in range(300):
        p.grad = torch.tensor([0.8, -0.6], dtype=dtype)
        opt.step()
    assert p.tolist() == [3.0, 4.0]
    opt.param_groups[0]["lr"] = 1.0
    opt.step()
    assert p.tolist() != [3.0, 4.0]
    assert torch.isfinite(p).all()


@both_paths
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_systemds_decay_is_applied_exactly_once(dtype: torch.dtype, placement: str) -> None:
    """With g = 0 and ratio 1 the step is lr wd w: twice or never would show."""
    p = parameter([3.0, 4.0], dtype)
    stepped(p, [0.0, 0.0], lr=0.5, weight_decay=0.1, adapt=False, lr_placement=placement)
    np.testing.assert_allclose(p.detach().double(), np.array([3.0, 4.0]) * (1 - 0.5 * 0.1), rtol=1e-6)


def test_torch_88106_learning_rate_has_no_default() -> None:
    with pytest.raises(ValueError, match="lr"):
        LARS([parameter([1.0])])
    with pytest.raises(ValueError, match="lr"):
        LARS([{"params": [parameter([1.0])], "momentum": 0.9}])
    assert LARS([{"params": [parameter([1.0])], "lr": 3.0}]).param_groups[0]["lr"] == 3.0


@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_deepspeed_490_sharded_parameters_are_refused(optimizer: type[torch.optim.Optimizer]) -> None:
    """There ZeRO hands LAMB slices of a flat buffer, and the norms are those of slices."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match=r"whole tensors, and a parameter of shape \(4, 3\) is spread over ranks"):
            optimizer([torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))], lr=1.0)
    finally:
        dist.destroy_process_group()


@both_paths
def test_solo_learn_decay_and_adaptation_are_excluded_independently(dtype: torch.dtype) -> None:
    moved = {}
    for adapt in (True, False):
        for decay in (0.0, 0.1):
            p = parameter([3.0, 4.0], dtype)
            LARS([{"params": [p], "adapt": adapt, "weight_decay": decay}], lr=1.0, eps=0.0).param_groups[0]
            opt = stepped(p, [0.6, 0.8], adapt=adapt, weight_decay=decay, eps=0.0)
            moved[adapt, decay] = opt.state[p]["momentum_buffer"].norm().item()
    expected = {(True, 0.0): 0.005, (True, 0.1): 0.005, (False, 0.0): 1.0, (False, 0.1): 1.5}
    assert moved == pytest.approx(expected, rel=1e-6)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
