"""The LARS update for dense float32 tensors on the CPU, in as few passes over the memory as torch can make.

Norms come from BLAS dot products over blocks, the update from the kernel of torch's own SGD, one call per tensor.
That kernel computes `v = m v + (1 - dampening) (g + wd w); w -= lr v`, so `1 - dampening` carries the trust ratio.
Measured in benchmarks/records/optimizer.json; the reasons are in docs/decisions/0003-optimizer-implementation.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_lars.optim.tensors import Group, is_dense

#: 384 KiB: two operands and the scratch of one block stay in a second-level cache of 2 MiB.
BLOCK = 3 << 15
#: A BLAS dot product adds up in float32: the sum over more elements than this is carried in Python's float64.
DOT = 1 << 20
#: 1 - (1 - gain) is a multiple of 2^-53; above this gain the error stays under a quarter of float32's.
SMALLEST_GAIN = 2.0**-28


def suits_kind(w: Tensor) -> bool:
    """Tell whether tensors of this kind come here: float32 on the CPU."""
    return w.is_cpu and w.dtype == torch.float32


def suits_layout(w: Tensor, g: Tensor) -> bool:
    """Tell whether weights and gradient are dense and in one memory order, which the momentum then follows."""
    return g.stride() == w.stride() and g.dtype == w.dtype and is_dense(w)


def measure(ws: list[Tensor], gs: list[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """|w| of each flat tensor, and the norm that its denominator starts from: |g|, or |g + wd w|."""
    if group["denominator"] == "norm_of_sum":
        sign = -1.0 if group["maximize"] else 1.0
        scratch = ws[0].new_empty(min(BLOCK, max(w.numel() for w in ws)))
        squares = [_squares_of_sum(w, g, sign * group["weight_decay"], scratch) for w, g in zip(ws, gs, strict=True)]
    else:
        squares = [(_square(w), _square(g)) for w, g in zip(ws, gs, strict=True)]
    w_norm, x_norm = torch.tensor(squares, dtype=torch.float64).sqrt().unbind(1)
    return w_norm, x_norm


def _square(x: Tensor) -> float:
    if x.numel() <= DOT:
        return float(torch.dot(x, x).item())
    return float(sum(torch.dot(block, block).item() for block in torch.split(x, DOT)))


def _squares_of_sum(w: Tensor, g: Tensor, weight_decay: float, scratch: Tensor) -> tuple[float, float]:
    # The sum itself, block by block: |g|^2 + 2 wd <g, w> + wd^2 |w|^2 would be 4 % faster, and loses its digits where
    # the decay balances the gradient, which is where training ends.
    if w.numel() <= BLOCK:
        x = torch.add(g, w, alpha=weight_decay, out=scratch[: w.numel()])
        return torch.dot(w, w).item(), torch.dot(x, x).item()
    w_square = x_square = 0.0
    for w_block, g_block in zip(torch.split(w, BLOCK), torch.split(g, BLOCK), strict=True):
        x = torch.add(g_block, w_block, alpha=weight_decay, out=scratch[: w_block.numel()])
        w_square += torch.dot(w_block, w_block).item()
        x_square += torch.dot(x, x).item()
    return w_square, x_square


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
