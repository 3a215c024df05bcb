"""Architectures by name: `build("resnet18", num_classes=1000, zero_gamma=True)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from dist_lars.errors import UserError
from dist_lars.models import initialise
from dist_lars.models.alexnet import alexnet, alexnet_bn, alexnet_bn_all, alexnet_small
from dist_lars.models.resnet import DEPTHS, resnet, resnet_small
from dist_lars.models.small import cnn_small

ALEXNET = ("grouped", "dropout")
RESNET = ("stem", "zero_gamma")

# name -> (builder, options of `build` that it takes itself)
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "alexnet": (alexnet, ALEXNET),
    "alexnet_bn": (alexnet_bn, ALEXNET),
    "alexnet_bn_all": (alexnet_bn_all, ALEXNET),
    "alexnet_small": (alexnet_small, ("dropout",)),
    "cnn_small": (cnn_small, ()),
    "resnet_small": (resnet_small, ("zero_gamma",)),
    **{name: (partial(resnet, name), RESNET) for name in DEPTHS},
}
NAMES = tuple(MODELS)
OPTIONS = ("init", "zero_gamma", "fc_std", "bias_init", "stem", "grouped", "dropout")
DEFAULTS = {"grouped": True, "dropout": 0.5, "stem": "imagenet", "zero_gamma": False}


def build(
    name: str,
    num_classes: int,
    *,
    init: str = "own",
    fc_std: float | None = None,
    bias_init: float | None = None,
    **own: Any,
) -> nn.Module:
    """The network, initialised from torch's current random state; input [N, 3, H, W], output [N, num_classes].

    Args:
        name: one of `NAMES`.
        num_classes: of the last layer.
        init: "own" (what the network's source has) or "he" (`initialise.he`).
        fc_std: start the last linear layer from N(0, fc_std) with bias 0, as in arXiv 1706.02677 (0.01).
        bias_init: start every bias of convolutions and linear layers here; LARS with adapted biases needs |b| > 0.
        own: `zero_gamma`, `stem` (ResNets), `grouped`, `dropout` (AlexNets); one that the network has no use for is
            refused unless it is at its default.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(NAMES)}")
    make, takes = MODELS[name]
    idle = [k for k, v in own.items() if k not in takes and v != DEFAULTS[k]]
    if idle:
        able = [n for n in NAMES if idle[0] in MODELS[n][1]]
        raise UserError(f"model {name} has no use for {idle[0]} = {own[idle[0]]!r}; it is for {', '.join(able)}")
    model = make(num_classes=num_classes, **{k: v for k, v in own.items() if k in takes})
    if init == "he":
        initialise.he(model)
    if fc_std is not None:
        initialise.last_linear(model, fc_std)
    if bias_init is not None:
        initialise.biases(model, bias_init)
    return model
