"""Networks: the counts that tell one from another, and AlexNet's own pieces."""

import pytest
import torch

from dist_lars import models
from dist_lars.errors import UserError


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("resnet18", 11_689_512, 62), ("resnet50", 25_557_032, 161), ("alexnet", 60_965_224, 16)],
)
def test_parameters_at_1000_classes(name, parameters, tensors):
    with torch.device("meta"):
        model = models.build(name, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors


@pytest.mark.parametrize("size", [224, 227])
def test_alexnet_takes_both_crops(size):
    assert models.build("alexnet", 7)(torch.zeros(1, 3, size, size)).shape == (1, 7)


def test_alexnets_response_normalisation_is_the_papers():
    # b = a / (k + alpha * sum over 5 neighbouring channels of a^2)^beta with k 2, alpha 1e-4, beta 0.75 (section 3.3)
    norm = next(m for m in models.build("alexnet", 7).modules() if isinstance(m, torch.nn.LocalResponseNorm))
    x = 50 * torch.randn(2, 9, 3, 3)
    square = torch.nn.functional.pad(x.pow(2), (0, 0, 0, 0, 2, 2))
    expected = x / (2 + 1e-4 * sum(square[:, i : i + 9] for i in range(5))).pow(0.75)
    torch.testing.assert_close(norm(x), expected)


def test_the_seed_makes_the_weights():
    def weights():
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in models.build("resnet18", 10).parameters()])

    assert torch.equal(weights(), weights())


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="unknown model 'resnet17'; known: alexnet, resnet18"):
        models.build("resnet17", 10)
