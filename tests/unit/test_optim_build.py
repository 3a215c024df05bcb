"""One `build` for all optimizers: names, laws, values in groups, the rebuild."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from dist_lars.optim import LAMB, LARS, LAWS, NAMES, build

CLASSES = {
    "lars": LARS,
    "lamb": LAMB,
    "sgd": torch.optim.SGD,
    "sgd_momentum": torch.optim.SGD,
    "nesterov": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def groups(*scales: float) -> list[dict[str, Any]]:
    return [
        {"params": [torch.nn.Parameter(torch.tensor([3.0, 4.0]))], "param_names": [f"p{i}"], "lr_scale": s}
        for i, s in enumerate(scales or (1.0,))
    ]


def values(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]


def test_names() -> None:
    assert set(NAMES) == set(CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_builds_steps_and_survives_the_rebuild(name: str) -> None:
    given = groups(1.0, 0.5)
    opt = build(name, given, lr=0.25, momentum=0.75, weight_decay=0.125, betas=(0.5, 0.75))
    assert type(opt) is CLASSES[name]
    assert "lr" not in given[0]  # the caller's dicts are not written to
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.125]
    assert {g["weight_decay"] for g in opt.param_groups} == {0.125}
    before = values(opt)
    opt = type(opt)(opt.param_groups)
    assert values(opt) == before
    for group in opt.param_groups:
        group["params"][0].grad = torch.ones(2)
    opt.step()
    assert all(torch.isfinite(g["params"][0]).all() and g["params"][0][0] != 3.0 for g in opt.param_groups)


def test_torch_optimizers_get_their_own_meaning() -> None:
    options = {name: build(name, groups(), lr=1.0, momentum=0.75, weight_decay=0.1).param_groups[0] for name in NAMES}
    assert [options[n]["momentum"] for n in ("sgd", "sgd_momentum", "nesterov")] == [0, 0.75, 0.75]
    assert [options[n]["nesterov"] for n in ("sgd", "sgd_momentum", "nesterov")] == [False, False, True]
    assert (options["adam"]["decoupled_weight_decay"], options["adamw"]["decoupled_weight_decay"]) == (False, True)
    assert (options["adam"]["eps"], options["lamb"]["eps"], options["lars"]["eps"]) == (1e-8, 1e-6, 1e-9)
    assert build("sgd_momentum", groups(), lr=1.0, nesterov=True).param_groups[0]["nesterov"] is True


@pytest.mark.parametrize("name", LAWS)
def test_law_reaches_every_group_in_full(name: str) -> None:
    law = LAWS[name]
    for group in build("lars", groups(1.0, 0.5), lr=1.0, law=name, trust_coefficient=0.02).param_groups:
        assert {k: group[k] for k in ("denominator", "lr_placement", "eps", "min_norm", "clip")} == {
            k: getattr(law, k) for k in ("denominator", "lr_placement", "eps", "min_norm", "clip")
        }
        assert group["trust_coefficient"] == 0.02


def test_a_value_of_ones_own_replaces_the_laws() -> None:
    """Zero is a value, too."""
    group = build("lars", groups(), lr=1.0, law="default", min_norm=0.0, eps=0.0).param_groups[0]
    assert (group["min_norm"], group["eps"], group["denominator"]) == (0.0, 0.0, "norm_of_sum")
    assert build("lars", groups(), lr=1.0, law="paper", min_norm=0.5).param_groups[0]["min_norm"] == 0.5


def test_default_law_is_the_constructors_default() -> None:
    defaults = {k: v.default for k, v in inspect.signature(LARS).parameters.items()}
    law = LAWS["default"]
    for key in ("denominator", "lr_placement", "eps", "min_norm", "clip"):
        assert getattr(law, key) == defaults[key]


def test_laws_have_an_equation_and_a_source() -> None:
    assert set(LAWS) == {"default", "paper", "mlperf", "outside", "larc"}
    assert all(law.equation and law.source for law in LAWS.values())
    assert LAWS["mlperf"].exclude_from_adaptation == LAWS["mlperf"].exclude_from_decay == "bn_bias"


def test_own_values_of_a_group_win() -> None:
    own = [{**groups()[0], "weight_decay": 0.0, "adapt": False, "eps": 0.5}]
    group = build("lars", own, lr=1.0, weight_decay=0.1).param_groups[0]
    assert (group["weight_decay"], group["adapt"], group["eps"]) == (0.0, False, 0.5)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'lasr' \(did you mean 'lars'\?\); known: lars, lamb, sgd"):
        build("lasr", groups(), lr=1.0)
    with pytest.raises(ValueError, match=r"unknown law 'xyz'; known: default, paper, mlperf, outside, larc"):
        build("lars", groups(), lr=1.0, law="xyz")


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_training_does_not_wait_for_the_import_of_torchs_compiler(name: str) -> None:
    script = f"""
import sys, torch
from dist_lars import models, optim
net = models.build("resnet_small", 2)
opt = optim.build("{name}", [{{"params": list(net.parameters())}}], lr=1.0)
opt.zero_grad()
net(torch.ones(1, 3, 8, 8)).sum().backward()
opt.step()
opt.load_state_dict(opt.state_dict())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
