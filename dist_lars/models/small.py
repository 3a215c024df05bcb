"""A small network without normalisation, for tests, demos and studies on one or two cores."""

from torch import nn


def cnn_small(num_classes: int) -> nn.Module:
    """Three convolutions with pools and one linear layer, no normalisation: 94,538 parameters at 10 classes.

    For images of 8 px and more; weights start as PyTorch's layers do.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))
