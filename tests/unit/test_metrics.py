"""Sums and counts: exact, mergeable, and divided once."""

import math

import pytest
import torch

from dist_lars.metrics import Counts, cross_entropy, means


def sums_of(logits, labels, pieces):
    counts = Counts(torch.device("cpu"))
    for a, b in zip(logits.split(pieces), labels.split(pieces), strict=True):
        counts.add(cross_entropy(a, b), a, b)
    return counts.take()


def test_uneven_batches_add_up_to_the_whole():
    torch.manual_seed(0)
    logits, labels = torch.randn(13, 10, dtype=torch.float64), torch.randint(10, (13,))
    whole, parts = sums_of(logits, labels, 13), sums_of(logits, labels, 5)
    assert parts == pytest.approx(whole, rel=1e-12)
    ranked = logits.argsort(1, descending=True)
    assert whole["top1"] == (ranked[:, 0] == labels).sum()
    assert whole["top5"] == (ranked[:, :5] == labels[:, None]).sum()
    assert means(whole)["top1"] == pytest.approx(100 * whole["top1"] / 13)


def test_taking_starts_again_from_zero():
    counts = Counts(torch.device("cpu"))
    counts.add(torch.tensor(2.0), torch.eye(4), torch.arange(4))
    assert counts.take() == {"loss": 8.0, "top1": 4.0, "top5": 4.0, "count": 4.0}
    assert counts.take()["count"] == 0
    assert math.isnan(means(counts.take())["loss"])


def test_broken_logits_are_no_hits():
    counts = Counts(torch.device("cpu"))
    counts.add(torch.tensor(1.0), torch.full((8, 10), float("nan")), torch.full((8,), 9))
    assert counts.take()["top1"] == 0


def test_half_precision_logits_lose_no_loss():
    logits = torch.tensor([[12.0, 0.0]], dtype=torch.bfloat16)
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log1p(math.exp(-12)), rel=0.02)
