"""The LARS update in torch's multi-tensor operations: any device, dtype and layout, and never a wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_lars.optim.tensors import Group, LossScale, decayed, norms, portions


def measure(ws: list[Tensor], gs: list[Tensor], group: Group, scale: LossScale) -> tuple[Tensor, Tensor]:
    """|w| of each tensor, and the norm that its denominator starts from: |g|, or |g + wd w|."""
    if group["denominator"] == "norm_of_sum":
        return norms(ws), torch.cat([norms(_decayed(ws[s], gs[s], group, scale)) for s in portions(ws)])
    g_norm = norms(gs)
    scale.unscale_([g_norm])
    return norms(ws), g_norm


def update(
    ws: list[Tensor], gs: list[Tensor], vs: list[Tensor], ratios: Tensor | None, group: Group, scale: LossScale
) -> None:
    """One step in place: `ratios` None is a ratio of 1 for all, `vs` is empty without momentum."""
    for s in portions(ws):  # a call each: the temporaries of one portion are gone before those of the next
        _update_portion(ws[s], gs[s], vs[s], None if ratios is None else ratios[s], group, scale)


def _update_portion(
    ws: list[Tensor], gs: list[Tensor], vs: list[Tensor], ratios: Tensor | None, group: Group, scale: LossScale
) -> None:
    lr, inside = group["lr"], group["lr_placement"] == "inside"
    step = _decayed(ws, gs, group, scale)
    if ratios is not None:
        torch._foreach_mul_(step, (lr * ratios if inside else ratios).unbind())
    elif inside:
        torch._foreach_mul_(step, lr)
    scale.cancel_(step)
    if vs:
        _accelerate_(step, vs, group, scale)
    if not inside:
        torch._foreach_mul_(step, lr)
    torch._foreach_sub_(ws, step)


def _decayed(ws: list[Tensor], gs: list[Tensor], group: Group, scale: LossScale) -> list[Tensor]:
    return decayed(ws, gs, group["weight_decay"], group["maximize"], scale)


def _accelerate_(step: list[Tensor], vs: list[Tensor], group: Group, scale: LossScale) -> None:
    """v = m v + step; then step becomes v, or step + m v with Nesterov."""
    torch._foreach_mul_(vs, scale.unless_overflow(group["momentum"], vs[0]))
    if group["nesterov"]:
        torch._foreach_add_(vs, step)
        torch._foreach_add_(step, vs, alpha=group["momentum"])
    else:
        torch._foreach_add_(step, vs)
        torch._foreach_copy_(vs, step)
    scale.cancel_(step)
