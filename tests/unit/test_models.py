"""Networks: the counts that tell one from another, equality with their sources, and the pieces that are our own."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_lars import checkpoint, models
from dist_lars.errors import UserError
from dist_lars.models.alexnet import lrn

# name, options, classes, image size, parameters, tensors, multiply-adds of one image
TABLE = [
    ("alexnet", {}, 1000, 224, 60_965_224, 16, 724_406_816),
    ("alexnet", {"grouped": False}, 1000, 224, 62_378_344, 16, 1_135_256_096),
    ("alexnet_bn", {}, 1000, 224, 60_965_224, 16, 724_406_816),
    ("alexnet_bn_all", {}, 1000, 224, 60_966_600, 21, 724_406_816),
    ("alexnet_bn_all", {"grouped": False}, 1000, 224, 62_379_720, 21, 1_135_256_096),
    ("alexnet_small", {}, 10, 32, 1_107_210, 16, 25_269_248),
    ("cnn_small", {}, 10, 32, 94_538, 8, 10_323_200),
    ("resnet_small", {}, 10, 32, 78_042, 29, 12_501_632),
    ("resnet18", {}, 1000, 224, 11_689_512, 62, 1_814_073_344),
    ("resnet18", {"stem": "small"}, 10, 32, 11_173_962, 62, 555_422_720),
    ("resnet34", {}, 1000, 224, 21_797_672, 110, 3_663_761_408),
    ("resnet50", {}, 1000, 224, 25_557_032, 161, 4_089_184_256),
    ("resnet101", {}, 1000, 224, 44_549_160, 314, 7_801_405_440),
    ("resnet152", {}, 1000, 224, 60_192_808, 467, 11_513_626_624),
]


@pytest.mark.parametrize(("name", "options", "classes", "size", "parameters", "tensors", "work"), TABLE)
def test_the_table(name, options, classes, size, parameters, tensors, work):
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        model = models.build(name, classes, **options)
        output = model(torch.zeros(3, 3, size, size))
    assert output.shape == (3, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    assert flops.get_total_flops() == 2 * 3 * work


def test_the_table_names_every_model():
    assert {row[0] for row in TABLE} == set(models.NAMES)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_are_torchvisions(name):
    """Same names, same start for the same seed, same function."""
    torch.manual_seed(1)
    ours = models.build(name, 10).eval()
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, name)(num_classes=10).eval()
    for (a, x), (b, y) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a == b
        assert torch.equal(x, y), a
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_zero_gamma_makes_every_block_an_identity_at_first():
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        model = models.build(name, 10, zero_gamma=True)
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        assert all(getattr(block, last).weight.abs().max() == 0 for block in blocks)
        x = torch.rand(2, blocks[1].conv1.in_channels, 8, 8)  # its output is relu(x + 0)
        assert torch.equal(blocks[1](x), x)
        assert models.build(name, 10).layer1[0].bn1.weight.min() == 1
    small = models.build("resnet_small", 10, zero_gamma=True)
    assert sum(p.abs().max() == 0 for n, p in small.named_parameters() if n.endswith("bn2.weight")) == 3


def spread(layer: nn.Module) -> float:
    return float(layer.weight.detach().std())


def test_the_classifier_and_he_and_biases_start_as_asked():
    model = models.build("resnet18", 1000, fc_std=0.01)
    assert spread(model.fc) == pytest.approx(0.01, rel=0.05)
    assert model.fc.bias.abs().max() == 0
    net = models.build("alexnet", 1000, init="he", bias_init=0.1)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers[:-1]:
        fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
        assert spread(layer) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert spread(layers[-1]) == pytest.approx(0.01, rel=0.05)
    assert all((layer.bias == 0.1).all() for layer in layers)


def test_alexnets_start_as_their_sources_say():
    def start(name):
        layers = [m for m in models.build(name, 1000).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return [(round(spread(m), 3), round(float(m.bias.detach().mean()), 2)) for m in layers]

    assert start("alexnet") == [(0.01, b) for b in (0, 1, 0, 1, 1, 1, 1, 0)]
    assert start("alexnet_bn") == [(s, 0.01) for s in (0.01,) * 5 + (0.005, 0.005, 0.01)]


def shape(name: str, **options) -> nn.Module:
    """The network without numbers."""
    with torch.device("meta"):
        return models.build(name, 5, **options)


def kinds(model: nn.Module) -> str:
    names = {"Conv2d": "c", "BatchNorm2d": "b", "ReLU": "r", "LocalResponseNorm": "n", "MaxPool2d": "p"}
    return "".join(names[type(m).__name__] for m in model[0])


def test_where_the_normalisation_stands():
    assert kinds(shape("alexnet")) == "crnp crnp cr cr crp".replace(" ", "")
    assert kinds(shape("alexnet_bn")) == "crpb crpb crb crb crp".replace(" ", "")
    assert kinds(shape("alexnet_bn_all")) == "cbrp cbrp cbr cbr cbrp".replace(" ", "")
    norms = [m for m in shape("alexnet_bn").modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.affine, m.eps, m.momentum) == (False, 1e-4, 0.1) for m in norms)


@pytest.mark.parametrize("name", ["alexnet", "alexnet_bn", "alexnet_bn_all"])
@pytest.mark.parametrize("size", [224, 227])
def test_alexnets_take_both_crops(name, size):
    with torch.device("meta"):
        model = shape(name)
        assert model[0](torch.zeros(2, 3, size, size)).shape == (2, 256, 6, 6)
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)


def test_alexnets_groups_and_dropout():
    grouped = [m.groups for m in shape("alexnet").modules() if isinstance(m, nn.Conv2d)]
    assert grouped == [1, 2, 1, 2, 2]
    assert {m.p for m in shape("alexnet", dropout=0.2).modules() if isinstance(m, nn.Dropout)} == {0.2}


def test_response_normalisation_is_the_papers():
    """b = a / (k + alpha * sum over 5 neighbouring channels of a^2)^beta with k 2, alpha 1e-4, beta 0.75 (section 3.3).

    torch's own alpha is divided by the 5: with the paper's value given to it, the sum would count for a fifth.
    """
    x = 50 * torch.randn(2, 9, 3, 3)
    square = nn.functional.pad(x.pow(2), (0, 0, 0, 0, 2, 2))
    expected = x / (2 + 1e-4 * sum(square[:, i : i + 9] for i in range(5))).pow(0.75)
    torch.testing.assert_close(lrn()(x), expected)
    divided = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)(x)
    torch.testing.assert_close(divided, x / (2 + 1e-4 / 5 * sum(square[:, i : i + 9] for i in range(5))).pow(0.75))
    assert (divided / lrn()(x)).max() > 1.1


def tiny(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = models.build(name, 3, **({"dropout": 0.0} if name.startswith("alexnet") else {}))
    for m in model.modules():  # a kink of ReLU or a tie of a pool has no derivative to compare with
        if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None:
            nn.init.normal_(m.bias, std=0.1)
    return model.double().train(), torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", ["alexnet_small", "cnn_small", "resnet_small"])
def test_gradients_of_our_networks(name):
    model, images = tiny(name)
    first = next(model.parameters())
    assert torch.autograd.gradcheck(lambda x, _: model(x), (images, first), fast_mode=True, atol=1e-6, eps=1e-7)


def test_gradients_of_response_normalisation():
    x = torch.randn(1, 7, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lrn(), (10 * x,))


def test_the_seed_makes_the_weights():
    def weights(name):
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in models.build(name, 10).parameters()])

    for name in ("resnet18", "alexnet_small", "resnet_small", "cnn_small"):
        assert torch.equal(weights(name), weights(name))


def test_wrong_names_and_idle_options_are_refused():
    with pytest.raises(UserError, match="unknown model 'resnet17'; known: alexnet, alexnet_bn, .*resnet18"):
        models.build("resnet17", 10)
    with pytest.raises(UserError, match="alexnet has no use for zero_gamma = True; it is for resnet_small, resnet18"):
        models.build("alexnet", 10, zero_gamma=True)
    with pytest.raises(UserError, match="resnet18 has no use for dropout = 0.1; it is for alexnet, alexnet_bn"):
        models.build("resnet18", 10, dropout=0.1)
    assert models.build("cnn_small", 10, zero_gamma=False, dropout=0.5, stem="imagenet", grouped=True)


# --- weights from a file ----------------------------------------------------------------------------------------------


def test_a_plain_state_dict_loads_even_from_an_old_pytorch(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=4)
    old = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    for zipped in (True, False):
        torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=zipped)
        model = models.build("resnet18", 4)
        checkpoint.load_weights(model, checkpoint.read_weights(tmp_path / "old.pth"), "old.pth")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in old.items())


def test_a_checkpoint_gives_the_weights_that_it_evaluated(tmp_path):
    state = {"step": 3, "model": {"w": torch.zeros(2)}}
    checkpoint.save(tmp_path / "checkpoints", state, best=False, keep=1)
    assert checkpoint.read_weights(tmp_path)["w"].sum() == 0
    path = checkpoint.save(tmp_path / "checkpoints", {**state, "ema": {"w": torch.ones(2)}}, best=False, keep=1)
    assert checkpoint.read_weights(path)["w"].sum() == checkpoint.read_weights(tmp_path)["w"].sum() == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model.weights: .* does not exist"),
        (b"not weights", "model.weights: .* cannot be read"),
        ({"w": 3}, "neither a checkpoint of ours nor a state_dict"),
        ({}, "neither a checkpoint of ours nor a state_dict"),
        (nn.Linear(2, 2), "model.weights: .* cannot be read"),  # a pickled object could run code
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        checkpoint.read_weights(path)


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    torch.save(models.build("resnet18", 4).state_dict(), tmp_path / "four.pt")
    with pytest.raises(
        UserError, match=r"four.pt is of another model: 2 of 122 tensors differ, first fc.weight: \(4, 5"
    ):
        checkpoint.load_weights(models.build("resnet18", 10), checkpoint.read_weights(tmp_path / "four.pt"), "four.pt")
