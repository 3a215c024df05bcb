"""Learning rates as pure functions: scaling rules with the batch, and the rate of every step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """All numbers of one schedule; steps are optimizer steps, counted from 0.

    Total steps and decay steps are separate numbers: published recipes count either (MLPerf's "decay steps" include
    the warm-up at some batches and exclude it at others), so neither is derived from the other here.
    """

    peak: float
    start: float
    end: float
    warmup_steps: int
    decay_steps: int
    decay: str  # poly | cosine | step | constant
    power: float
    milestones: tuple[int, ...]  # step decay only, counted from step 0
    gamma: float


def scaled_lr(rule: str, base_lr: float, batch: int, base_batch: int) -> float:
    """Peak learning rate for a batch.

    linear: base_lr * batch / base_batch (Goyal et al. 2017, arXiv 1706.02677, section 2.1; for SGD).
    sqrt:   base_lr * sqrt(batch / base_batch) (Krizhevsky 2014, arXiv 1404.5997, section 5; You et al. 2019,
            arXiv 1904.00962, for LAMB; measured to be bad for SGD: 1706.02677, Table 2a).
    none:   base_lr.
    """
    ratio = batch / base_batch
    return base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


def lr_at(step: int, rate: Rate) -> float:
    """The learning rate of optimizer step `step` (0, 1, ...).

    Warm-up over W steps is linear: step s uses start + (peak - start) * (s + 1) / W, so that step 0 already moves and
    step W - 1 uses the peak. The decay is counted from the end of the warm-up (re-based): with t = (step - W) / D,
    poly is end + (peak - end) * (1 - t)^power and cosine end + (peak - end) * (1 + cos(pi t)) / 2, both `end` from
    t = 1 on. `step` multiplies by gamma at each milestone, counted from step 0 as in Goyal et al., never below `end`.

    The rival convention, nvcaffe's (the LARS paper's code): quadratic warm-up, and the polynomial runs over all
    iterations from 0 without re-basing.
    """
    if step < rate.warmup_steps:
        return rate.start + (rate.peak - rate.start) * (step + 1) / rate.warmup_steps
    t = min(1.0, (step - rate.warmup_steps) / rate.decay_steps) if rate.decay_steps else 1.0
    if rate.decay == "poly":
        return rate.end + (rate.peak - rate.end) * math.pow(1 - t, rate.power)
    if rate.decay == "cosine":
        return rate.end + (rate.peak - rate.end) * (1 + math.cos(math.pi * t)) / 2
    if rate.decay == "step":
        return max(rate.end, rate.peak * math.pow(rate.gamma, sum(step >= m for m in rate.milestones)))
    if rate.decay == "constant":
        return rate.peak
    raise ValueError(f"decay {rate.decay!r} is not one of poly, cosine, step, constant")
