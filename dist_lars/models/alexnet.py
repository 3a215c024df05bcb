"""AlexNet as it was in 2012 (Krizhevsky, Sutskever, Hinton: ImageNet classification with deep CNNs, NIPS 2012)."""

import torch
from torch import nn


def alexnet(num_classes: int = 1000) -> nn.Module:
    """The two-tower network on one device: grouped conv2, conv4, conv5, LRN, overlapping pools, dropout.

    60,965,224 parameters at 1000 classes. The first convolution pads by 2, so that the 224 px crop gives the 55 x 55
    map of the paper (which needs 227 px without padding). The rival is torchvision's `alexnet`, the 2014 "one weird
    trick" network with 61,100,840 parameters, no groups and no LRN. Biases of conv2, conv4, conv5 and of the
    hidden linear layers start at 1 and weights at N(0, 0.01), section 5 of the paper.
    """
    features = [
        *_stage(3, 96, kernel=11, stride=4, padding=2, lrn=True, pool=True),
        *_stage(96, 256, kernel=5, padding=2, groups=2, lrn=True, pool=True, bias=1.0),
        *_stage(256, 384, kernel=3, padding=1),
        *_stage(384, 384, kernel=3, padding=1, groups=2, bias=1.0),
        *_stage(384, 256, kernel=3, padding=1, groups=2, pool=True, bias=1.0),
    ]
    classifier = [
        nn.AdaptiveAvgPool2d(6),  # the identity at 224 and 227 px; other sizes work too
        nn.Flatten(),
        nn.Dropout(0.5),
        _initialised(nn.Linear(256 * 6 * 6, 4096), 1.0),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        _initialised(nn.Linear(4096, 4096), 1.0),
        nn.ReLU(inplace=True),
        _initialised(nn.Linear(4096, num_classes), 0.0),
    ]
    return nn.Sequential(nn.Sequential(*features), nn.Sequential(*classifier))


def _stage(
    inputs: int,
    outputs: int,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    lrn: bool = False,
    pool: bool = False,
    bias: float = 0.0,
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups)
    layers: list[nn.Module] = [_initialised(convolution, bias), nn.ReLU(inplace=True)]
    if lrn:
        # The paper's alpha 1e-4 multiplies the sum over n = 5 channels; torch divides alpha by n.
        layers.append(nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0))
    if pool:
        layers.append(nn.MaxPool2d(3, stride=2))
    return layers


def _initialised(layer: nn.Conv2d | nn.Linear, bias: float) -> nn.Module:
    with torch.no_grad():
        layer.weight.normal_(0.0, 0.01)
        if layer.bias is not None:
            layer.bias.fill_(bias)
    return layer
