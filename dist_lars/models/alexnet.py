"""AlexNet as it was in 2012, the forms with BatchNorm that large-batch papers trained, and a reduced one.

The rival of all of them is torchvision's `alexnet`, the "one weird trick" network of 2014 (64-192-384-256-256
channels, no groups, no response normalisation, 61,100,840 parameters).
"""

from collections.abc import Callable

from torch import nn

from dist_lars.models import initialise

Layers = list[nn.Module]
Place = Callable[[int, int], Layers]  # (number of the convolution from 0, its channels) -> what stands there

# Convolutions 1 to 5: (outputs, kernel, stride, padding, split over the two GPUs of 2012, a pool after it). The first
# pads by 2: a 224 px crop then gives the paper's 55 x 55 map, which without padding needs a crop of 227 px.
CONVOLUTIONS = (
    (96, 11, 4, 2, False, True),
    (256, 5, 1, 2, True, True),
    (384, 3, 1, 1, False, False),
    (384, 3, 1, 1, True, False),
    (256, 3, 1, 1, True, True),
)


def alexnet(num_classes: int = 1000, grouped: bool = True, dropout: float = 0.5) -> nn.Module:
    """Krizhevsky, Sutskever, Hinton: ImageNet classification with deep convolutional neural networks, NIPS 2012.

    Response normalisation after conv1 and conv2, before their overlapping pools; dropout. Weights start from
    N(0, 0.01), the biases of conv2, conv4, conv5 and the hidden linear layers at 1, the others at 0 (section 5).
    60,965,224 parameters at 1000 classes, 62,378,344 with `grouped=False`.
    """
    features = _features(grouped, after_relu=lambda i, _: [lrn()] if i < 2 else [])
    model = _assemble(features, num_classes, dropout)
    return _start(model, std=(0.01,) * 8, bias=(0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0))


def alexnet_bn(num_classes: int = 1000, grouped: bool = True, dropout: float = 0.5) -> nn.Module:
    """The network behind "AlexNet-BN" of the LARS paper (arXiv 1708.03888), as its authors' code trains it.

    models/alexnet_bn/train_val2.prototxt of github.com/borisgin/nvcaffe-0.16: no response normalisation; BatchNorm
    without scale and shift at the inputs of conv2 to conv5, after ReLU and pool; none at the linear layers. All biases
    start at 0.01, so that LARS never meets |b| = 0; weights from N(0, 0.01), those of the hidden linear layers from
    N(0, 0.005). BatchNorm keeps 0.9 of its running statistics and adds 1e-4 to the variance.
    """
    features = _features(grouped, after_pool=lambda i, n: [nn.BatchNorm2d(n, eps=1e-4, affine=False)] if i < 4 else [])
    return _start(_assemble(features, num_classes, dropout), std=BVLC_STD, bias=(0.01,) * 8)


def alexnet_bn_all(num_classes: int = 1000, grouped: bool = True, dropout: float = 0.5) -> nn.Module:
    """BatchNorm with scale and shift after every convolution, before its ReLU: what most code calls AlexNet-BN.

    As models/alexnet_bn/train_val.prototxt of the same repository and, with `grouped=False`, as
    scripts/nn/networks/alexnet.dml of github.com/apache/systemds. No convolution has a bias here, for BatchNorm would
    subtract it again (the first keeps conv5's, the second all). Starts as `alexnet_bn` does.
    """
    features = _features(grouped, after_convolution=lambda _, n: [nn.BatchNorm2d(n, eps=1e-4)], biased=False)
    return _start(_assemble(features, num_classes, dropout), std=BVLC_STD, bias=(0.01,) * 8)


def alexnet_small(num_classes: int = 10, dropout: float = 0.5) -> nn.Module:
    """AlexNet reduced for 32 to 64 px: five convolutions, three overlapping pools, three linear layers.

    Our own reduction, 1,107,210 parameters at 10 classes, for studies of large batches without normalisation. Hidden
    layers start from He's rule (N(0, 0.01) would let the signal of so narrow a network vanish), biases at 0.01.
    """
    features: Layers = []
    for inputs, outputs, pool in ((3, 32, True), (32, 64, True), (64, 128, False), (128, 128, False), (128, 64, True)):
        features += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        features += [nn.MaxPool2d(3, stride=2, padding=1)] if pool else []
    model = _assemble(features, num_classes, dropout, inputs=64, side=4, hidden=512)
    initialise.he(model)
    initialise.last_linear(model, 0.01)
    initialise.biases(model, 0.01)
    return model


BVLC_STD = (0.01,) * 5 + (0.005, 0.005, 0.01)  # also models/bvlc_alexnet/train_val.prototxt of github.com/BVLC/caffe


def lrn() -> nn.Module:
    """Response normalisation over 5 channels: a / (2 + 1e-4 * sum of their squares)^0.75, section 3.3 of the paper.

    torch (as caffe) divides its alpha by the number of channels, hence 5 times the paper's alpha here.
    """
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)


def _nothing(number: int, channels: int) -> Layers:
    return []


def _features(
    grouped: bool,
    *,
    after_convolution: Place = _nothing,
    after_relu: Place = _nothing,
    after_pool: Place = _nothing,
    biased: bool = True,
) -> Layers:
    layers: Layers = []
    inputs = 3
    for i, (outputs, kernel, stride, padding, split, pool) in enumerate(CONVOLUTIONS):
        groups = 2 if split and grouped else 1
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=biased)]
        layers += [*after_convolution(i, outputs), nn.ReLU(inplace=True), *after_relu(i, outputs)]
        layers += [nn.MaxPool2d(3, stride=2)] if pool else []
        layers += after_pool(i, outputs)
        inputs = outputs
    return layers


def _assemble(
    features: Layers, num_classes: int, dropout: float, inputs: int = 256, side: int = 6, hidden: int = 4096
) -> nn.Sequential:
    classifier = [
        nn.AdaptiveAvgPool2d(side),  # the identity at the size the network is made for; other sizes work too
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(inputs * side * side, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    ]
    return nn.Sequential(nn.Sequential(*features), nn.Sequential(*classifier))


def _start(model: nn.Module, std: tuple[float, ...], bias: tuple[float, ...]) -> nn.Module:
    """Gaussian weights and constant biases of the eight layers, in order."""
    for layer, deviation, value in zip(initialise.weighted(model), std, bias, strict=True):
        nn.init.normal_(layer.weight, 0.0, deviation)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, value)
    return model
