"""Which parameter is in which group, and which models are refused."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from dist_lars.optim import LAWS, param_groups


def placed(groups: list[dict]) -> dict[str, tuple[bool, float, float]]:
    """Name -> (adapt, weight_decay, lr_scale); a name in two groups would be lost, so the count is compared."""
    found = {n: (g["adapt"], g["weight_decay"], g["lr_scale"]) for g in groups for n in g["param_names"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == sum(len(g["param_names"]) for g in groups)
    return found


@pytest.mark.parametrize(
    "build", [torchvision.models.resnet18, torchvision.models.resnet50, torchvision.models.alexnet]
)
@pytest.mark.parametrize("adaptation", ["none", "bn_bias"])
@pytest.mark.parametrize("decay", ["none", "bn_bias"])
@pytest.mark.parametrize("bias_lr_scale", [1.0, 0.1])
def test_every_parameter_is_in_exactly_one_group(
    build: Callable[..., nn.Module], adaptation: str, decay: str, bias_lr_scale: float
) -> None:
    with torch.device("meta"):
        model = build()
    options = {"exclude_from_adaptation": adaptation, "exclude_from_decay": decay, "bias_lr_scale": bias_lr_scale}
    groups = param_groups(model, weight_decay=0.25, **options)
    found = placed(groups)
    named = dict(model.named_parameters())
    assert set(found) == set(named)
    assert all(named[n] is p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True))
    for name, (adapt, weight_decay, lr_scale) in found.items():
        excluded = named[name].dim() == 1  # true of these three models; the code must not go by it
        norm = excluded and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
        assert adapt == (adaptation == "none" or not excluded)
        assert weight_decay == (0.0 if decay == "bn_bias" and excluded else 0.25)
        assert lr_scale == (bias_lr_scale if excluded and not norm else 1.0)


def test_resnet18_counts() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    law = LAWS["mlperf"]
    exclusions = {k: getattr(law, k) for k in ("exclude_from_adaptation", "exclude_from_decay")}
    groups = param_groups(model, weight_decay=2e-4, **exclusions)
    assert [(len(g["params"]), g["adapt"], g["weight_decay"]) for g in groups] == [(21, True, 2e-4), (41, False, 0.0)]
    assert sum(p.numel() for g in groups for p in g["params"]) == 11_689_512


def test_batchnorm_under_a_name_without_bn_is_found_by_its_type() -> None:
    """ResNet's `downsample.1` is a BatchNorm that no search for "bn" finds."""
    found = placed(param_groups(torchvision.models.resnet18(), weight_decay=0.25, exclude_from_decay="bn_bias"))
    names = [f"layer{i}.0.downsample.1.{kind}" for i in (2, 3, 4) for kind in ("weight", "bias")]
    assert all(found[name] == (True, 0.0, 1.0) for name in names)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 4]),  # its parameters have two dimensions
        nn.InstanceNorm2d(4, affine=True),
        nn.RMSNorm([4, 4]),
    ],
    ids=lambda n: type(n).__name__,
)
def test_normalisation_layers_of_every_kind(norm: nn.Module) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "other": norm})
    found = placed(param_groups(model, weight_decay=0.25, exclude_from_adaptation="bn_bias"))
    assert found.pop("layer.weight") == (True, 0.25, 1.0)
    assert all(not adapt for adapt, _, _ in found.values())


def test_biases_of_recurrent_and_attention_layers_are_biases() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "attention": nn.MultiheadAttention(4, 2)})
    found = placed(param_groups(model, weight_decay=0.25, exclude_from_decay="bn_bias"))
    assert {n for n, (_, decay, _) in found.items() if decay == 0.0} == {n for n in found if "bias" in n}


def test_model_that_is_one_layer() -> None:
    assert placed(param_groups(nn.Linear(2, 2), weight_decay=0.5)) == {n: (True, 0.5, 1.0) for n in ("weight", "bias")}


def test_shared_parameters_are_refused_by_both_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"a\.weight = b\.weight"):
        param_groups(model, weight_decay=0.1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.gamma = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 4)


def test_bare_vectors_need_a_role() -> None:
    with pytest.raises(ValueError, match=r"the role of inner\.gamma; give it, for example roles={'inner\.gamma'"):
        param_groups(nn.ModuleDict({"inner": Scaled()}), weight_decay=0.1)
    found = placed(param_groups(Scaled(), weight_decay=0.1, exclude_from_decay="bn_bias", roles={"gamma": "norm"}))
    assert (found["gamma"][1], found["token"][1]) == (0.0, 0.1)


def test_wrong_words_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="exclude_from_decay is 'bn'; known: none, bn_bias"):
        param_groups(model, weight_decay=0.1, exclude_from_decay="bn")
    with pytest.raises(ValueError, match="exclude_from_adaptation is 'all'; known: none, bn_bias"):
        param_groups(model, weight_decay=0.1, exclude_from_adaptation="all")
    with pytest.raises(ValueError, match=r"roles names parameters that the model does not have: wieght"):
        param_groups(model, weight_decay=0.1, roles={"wieght": "weight"})
    with pytest.raises(ValueError, match="the role of weight"):
        param_groups(model, weight_decay=0.1, roles={"weight": "kernel"})
