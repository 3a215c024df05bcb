"""Checks on numbers: gradients that are not finite, losses that run away, replicas that drift apart."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from dist_lars.errors import AgreedError

BLOCK = 1 << 20  # elements that a checksum widens to float64 at a time


class Diverged(AgreedError):
    """Training has failed in its numbers, on all ranks alike; the text says where and how."""


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The global gradient norm; not finite exactly if some gradient is not (or overflows float32 when squared).

    Taken after gradients were averaged, hence the same on every rank: each may decide by it alone. Reading it waits
    for the device, which the averaging has just done anyway.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


def not_finite(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters whose gradient holds inf or nan."""
    return [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]


class LossBound:
    """Raises `Diverged` when the loss stays above a bound for so many steps in a row."""

    def __init__(self, bound: float, steps: int) -> None:
        self.bound, self.steps, self.above_since = bound, steps, -1

    def check(self, loss: float, step: int) -> None:
        """`loss` is the mean up to `step`."""
        if loss <= self.bound:
            self.above_since = -1
            return
        if self.above_since < 0:
            self.above_since = step
        if step - self.above_since >= self.steps:
            raise Diverged(
                f"the loss has been above {self.bound:g} since step {self.above_since} (now {loss:g} at step {step}): "
                f"lower the learning rate, lengthen the warm-up, or raise --guard.max_loss"
            )


def default_bound(classes: int) -> float:
    """Three times the loss of guessing: no healthy training stays there."""
    return 3 * math.log(max(2, classes))


def tensor_sums(tensors: Iterable[torch.Tensor]) -> list[float]:
    """A float64 sum per tensor, weighted by position, so that swapped values show too."""
    sums = [_weighted_sum(t.detach().reshape(-1)) for t in tensors]
    return torch.stack(sums).tolist() if sums else []


def _weighted_sum(flat: torch.Tensor) -> torch.Tensor:
    """In blocks: in float64 AlexNet's largest layer and its weights would take 900 MB of a GPU that is full."""
    total = torch.zeros((), device=flat.device, dtype=torch.float64)
    for start, block in enumerate(flat.split(BLOCK)):
        first = 1 + start * BLOCK
        weights = torch.arange(first, first + block.numel(), device=flat.device, dtype=torch.float64)
        total += (weights * block).sum()
    return total


def first_difference(names: list[str], per_rank: list[list[float]]) -> tuple[list[int], str] | None:
    """(ranks that differ from rank 0, first tensor in which they do); None when all are equal, nan included."""

    def key(row: list[float]) -> list[str]:
        return [value.hex() for value in row]

    odd = [r for r, row in enumerate(per_rank) if key(row) != key(per_rank[0])]
    if not odd:
        return None
    at = next(i for i, name in enumerate(names) if per_rank[odd[0]][i].hex() != per_rank[0][i].hex())
    return odd, names[at]
