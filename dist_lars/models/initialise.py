"""Starting weights that large-batch recipes change, for any network."""

from collections.abc import Iterator

from torch import nn


def he(model: nn.Module) -> None:
    """He normal, fan out, for every convolution and every linear layer but the last; biases stay.

    arXiv 1502.01852, equation 14; torchvision's ResNets have it for convolutions from the start.
    """
    for layer in list(weighted(model))[:-1]:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def last_linear(model: nn.Module, std: float) -> None:
    """The classifier from N(0, std), its bias 0: every class starts about as likely (arXiv 1706.02677, section 5.1)."""
    last = list(weighted(model))[-1]
    nn.init.normal_(last.weight, 0.0, std)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def biases(model: nn.Module, value: float) -> None:
    """Every bias of a convolution or linear layer at `value`."""
    for layer in weighted(model):
        if layer.bias is not None:
            nn.init.constant_(layer.bias, value)


def weighted(model: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    """Convolutions and linear layers, in order."""
    return (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
