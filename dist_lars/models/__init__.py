"""Architectures by name: `build("resnet18", num_classes=1000)`."""

from collections.abc import Callable

import torchvision
from torch import nn

from dist_lars.errors import UserError
from dist_lars.models.alexnet import alexnet

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": alexnet,
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
    "resnet152": torchvision.models.resnet152,
}
NAMES = tuple(BUILDERS)


def build(name: str, num_classes: int) -> nn.Module:
    """The network, initialised from torch's current random state; input [N, 3, H, W], output [N, num_classes]."""
    if name not in BUILDERS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(NAMES)}")
    return BUILDERS[name](num_classes=num_classes)
