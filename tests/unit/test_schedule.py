"""Learning rates: the corners as tables, the shapes as properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lars.schedule import Rate, lr_at, scaled_lr


def rate(**changes) -> Rate:
    values = {
        "peak": 8.0, "start": 0.0, "end": 0.0, "warmup_steps": 4, "decay_steps": 8, "decay": "poly", "power": 2.0,
        "milestones": (6, 10), "gamma": 0.1,
    }  # fmt: skip
    return Rate(**{**values, **changes})


@pytest.mark.parametrize(
    ("rule", "base", "expected"),
    [
        ("linear", 0.1, [0.1, 0.4, 1.6, 3.2]),
        ("sqrt", 0.1, [0.1, 0.2, 0.4, 0.565685424949238]),
        ("none", 0.1, [0.1] * 4),
        ("linear", 0.01, [0.01, 0.04, 0.16, 0.32]),
    ],
)
def test_scaling_rules_at_256_1024_4096_8192(rule, base, expected):
    assert [scaled_lr(rule, base, b, 256) for b in (256, 1024, 4096, 8192)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 2, 1: 4, 2: 6, 3: 8, 4: 8, 8: 2, 11: 8 / 64, 12: 0, 13: 0}),
        ({"start": 4.0}, {0: 5, 3: 8}),
        ({"warmup_steps": 0}, {0: 8, 4: 2, 8: 0}),
        ({"end": 1.0}, {4: 8, 8: 2.75, 12: 1, 100: 1}),
        ({"decay_steps": 4}, {4: 8, 6: 2, 8: 0, 11: 0}),  # the decay may end before training does
        ({"decay": "cosine"}, {4: 8, 8: 4, 10: 4 * (1 + math.cos(0.75 * math.pi)), 12: 0}),
        ({"decay": "step"}, {4: 8, 5: 8, 6: 0.8, 9: 0.8, 10: 0.08, 99: 0.08}),
        ({"decay": "step", "end": 0.5}, {6: 0.8, 10: 0.5}),
        ({"decay": "constant"}, {3: 8, 4: 8, 99: 8}),
    ],
)
def test_rate_at_its_corners(changes, expected):
    assert {s: lr_at(s, rate(**changes)) for s in expected} == pytest.approx(expected)


def test_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="poly, cosine, step, constant"):
        lr_at(9, rate(decay="exponential"))


@given(
    warmup=st.integers(1, 50),
    decay=st.integers(1, 50),
    peak=st.floats(0.01, 50),
    shape=st.sampled_from(["poly", "cosine", "step"]),
)
def test_rises_to_the_peak_exactly_and_falls_after(warmup, decay, peak, shape):
    r = rate(peak=peak, warmup_steps=warmup, decay_steps=decay, decay=shape, milestones=(warmup + 1, warmup + 3))
    rates = [lr_at(s, r) for s in range(warmup + decay + 3)]
    assert rates[0] > 0
    assert max(rates) == pytest.approx(peak) == rates[warmup - 1]
    assert all(a < b for a, b in zip(rates[: warmup - 1], rates[1:warmup], strict=True))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert min(rates) >= 0
