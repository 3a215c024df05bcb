"""The running average of the weights, and label smoothing: against formulas written out here."""

import pytest
import torch
from torch import nn

from dist_lars.ema import Ema
from dist_lars.metrics import cross_entropy


def test_the_average_follows_its_formula():
    w, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0])
    ema = Ema([w, b], decay=0.5)
    expected = w.clone()
    for step in range(30):
        w += torch.randn(2)
        b += 1
        ema.update(step)
        d = min(0.5, step / (step + 9))
        expected = d * expected + (1 - d) * w
    torch.testing.assert_close(ema.average[0], expected)
    assert ema.average[1] == pytest.approx(34, abs=1e-3)  # 35 - 1: an average of decay 0.5 is one step behind


def test_it_forgets_the_initial_weights_at_once():
    w = torch.full((3,), 1e6)
    ema = Ema([w], decay=0.9999)
    w.fill_(1.0)
    ema.update(0)
    assert torch.equal(ema.average[0], w)


def test_inside_the_model_holds_the_average_and_outside_its_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 8, 8))
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    ema = Ema(tensors, decay=0.9)
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for t in tensors:
            t.add_(1)
    own = [t.detach().clone() for t in tensors]
    places = [t.data_ptr() for t in tensors]
    with pytest.raises(ZeroDivisionError), ema.swapped():
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        _ = 1 / 0
    assert all(torch.equal(t, o) for t, o in zip(tensors, own, strict=True))
    assert [t.data_ptr() for t in tensors] == places  # the optimizer and the reducer know them by place


def test_training_never_sees_the_average():
    def weights(decay):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        ema = Ema(model.parameters(), decay) if decay else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).pow(2).sum().backward()
            optimizer.step()
            if ema:
                ema.update(step)
                with ema.swapped():
                    model(torch.ones(3, 4))
        return model.weight.detach()

    assert torch.equal(weights(0.0), weights(0.9))


def test_label_smoothing_spreads_a_share_over_all_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(5, (7,))
    target = torch.full((7, 5), 0.1 / 5, dtype=torch.float64)
    target[range(7), labels] += 0.9
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, 0.1), expected)
    assert cross_entropy(logits, labels) == cross_entropy(logits, labels, 0.0) != expected
