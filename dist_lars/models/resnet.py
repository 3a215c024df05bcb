"""ResNets: torchvision's for ImageNet, with the options of large-batch recipes, and a small one for small images."""

from torch import Tensor, nn

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def resnet(name: str, num_classes: int, stem: str = "imagenet", zero_gamma: bool = False) -> nn.Module:
    """torchvision's network without its weights: version 1.5, stride on the 3x3 convolution (arXiv 1706.02677).

    `zero_gamma` starts the last BatchNorm of every block at 0, so that blocks begin as identities. The stem "small"
    (He et al. 2015, arXiv 1512.03385, section 4.2: the CIFAR-10 networks) replaces the 7x7 convolution of stride 2
    and the pool by a 3x3 convolution, for images that the other would shrink to a point.
    """
    import torchvision  # 2 s of every rank, for it imports torch's compiler: only for networks that are its own

    model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, zero_init_residual=zero_gamma)
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (arXiv 1512.03385, figure 5, left); modules are named as torchvision's."""

    def __init__(self, inputs: int, outputs: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(inputs, outputs, 3, stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv_bn(outputs, outputs, 3)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)).add_(shortcut))


def resnet_small(num_classes: int, zero_gamma: bool = False, width: int = 16, blocks: int = 1) -> nn.Module:
    """Three stages of basic blocks, `width`, 2 and 4 times it wide, for images of 32 to 64 px.

    The shape of arXiv 1512.03385, section 4.2, with one block per stage (8 weighted layers, 78,042 parameters at 10
    classes) and projections where the width changes (there: padding, option A).
    """
    layers: list[nn.Module] = [*_conv_bn(3, width, 3), nn.ReLU(inplace=True)]
    inputs = width
    for stage in range(3):
        outputs = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            shortcut = (
                None if (stride, inputs) == (1, outputs) else nn.Sequential(*_conv_bn(inputs, outputs, 1, stride))
            )
            layers.append(BasicBlock(inputs, outputs, stride, shortcut))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
    _start(model, zero_gamma)
    return model


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


def _start(model: nn.Module, zero_gamma: bool) -> None:
    """He normal for convolutions, as torchvision's ResNets start."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_gamma and isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
