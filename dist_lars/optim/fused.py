"""The LARS update for dense float32 tensors on the CPU, in as few passes over the memory as torch can make.

Norms come from BLAS dot products over blocks, the update from the kernel of torch's own SGD, one call per tensor.
That kernel computes `v = m v + (1 - dampening) (g + wd w); w -= lr v`, so `1 - dampening` carries the trust ratio.
Measured in benchmarks/records/optimizer.json; the reasons are in docs/decisions/0003-optimizer-implementation.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_lars.optim.tensors import Group, is_dense, same_order

#: 512 KiB: after the first dot product of a block, both operands are in a second-level cache of 1 or 2 MiB.
BLOCK = 1 << 17
#: A BLAS dot product adds up in float32: the sum over more elements than this is carried in Python's float64.
DOT = 1 << 20
#: Below this share of its terms, |g + wd w|^2 is computed from the sum itself: above it, their cancellation costs at
#: most a factor of 100 of the 1e-7 that the dot products are exact to.
CANCELLED = 0.01
#: 1 - (1 - gain) is a multiple of 2^-53; above this gain the error stays under a quarter of float32's.
SMALLEST_GAIN = 2.0**-28


def suits_kind(w: Tensor) -> bool:
    """Tell whether tensors of this kind come here: float32 on the CPU."""
    return w.is_cpu and w.dtype == torch.float32


def suits_layout(w: Tensor, g: Tensor) -> bool:
    """Tell whether weights and gradient are dense and in one memory order, which the momentum then follows."""
    return same_order(w, g) and g.dtype == w.dtype and is_dense(w)


def measure(ws: list[Tensor], gs: list[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """|w| of each flat tensor, and the norm that its denominator starts from: |g|, or |g + wd w|."""
    decay = -group["weight_decay"] if group["maximize"] else group["weight_decay"]
    if group["denominator"] == "norm_of_sum" and decay:
        squares = [_squares_of_sum(w, g, decay) for w, g in zip(ws, gs, strict=True)]
    else:
        squares = [(_square(w), _square(g)) for w, g in zip(ws, gs, strict=True)]
    w_norm, x_norm = torch.tensor(squares, dtype=torch.float64).sqrt().unbind(1)
    return w_norm, x_norm


def _square(x: Tensor) -> float:
    if x.numel() <= DOT:
        return float(torch.dot(x, x).item())
    return float(sum(torch.dot(block, block).item() for block in torch.split(x, DOT)))


def _squares_of_sum(w: Tensor, g: Tensor, decay: float) -> tuple[float, float]:
    """|w|^2 and |g + decay w|^2, the latter as |g|^2 + 2 decay <g, w> + decay^2 |w|^2 while that keeps its digits."""
    blocks = [(w, g)] if w.numel() <= BLOCK else list(zip(torch.split(w, BLOCK), torch.split(g, BLOCK), strict=True))
    gw = ww = gg = 0.0
    for w_block, g_block in blocks:
        gw += torch.dot(w_block, g_block).item()
        ww += torch.dot(w_block, w_block).item()
        gg += torch.dot(g_block, g_block).item()
    xx = gg + 2 * decay * gw + decay**2 * ww
    if xx < CANCELLED * (gg + decay**2 * ww):
        xx = sum(_square(torch.add(g_block, w_block, alpha=decay)) for w_block, g_block in blocks)
    return ww, xx


def update(ws: list[Tensor], gs: list[Tensor], vs: list[Tensor], ratios: list[float], group: Group) -> None:
    """One step in place on flat tensors; `vs` is empty without momentum."""
    lr = float(group["lr"])
    gains, rate = (ratios, lr) if group["lr_placement"] == "outside" else ([lr * r for r in ratios], 1.0)
    fixed = {"weight_decay": group["weight_decay"], "maximize": group["maximize"]}
    fixed |= {"momentum": group["momentum"], "nesterov": False, "is_first_step": False}
    if not vs:
        for w, g, gain in zip(ws, gs, gains, strict=True):
            torch._fused_sgd_([w], [g], [], lr=rate * gain, dampening=0.0, **fixed)
        return
    for w, g, v, gain in zip(ws, gs, vs, gains, strict=True):
        if gain == 0 or gain >= SMALLEST_GAIN:
            torch._fused_sgd_([w], [g], [v], lr=rate, dampening=1.0 - gain, **fixed)
        else:
            _exact(w, g, v, group, lr=rate, gain=gain)


def _exact(w: Tensor, g: Tensor, v: Tensor, group: Group, *, lr: float, gain: float) -> None:
    sign = -1.0 if group["maximize"] else 1.0
    v.mul_(group["momentum"]).add_(g, alpha=sign * gain).add_(w, alpha=gain * group["weight_decay"])
    w.sub_(v, alpha=lr)
