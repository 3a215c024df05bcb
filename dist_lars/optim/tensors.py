"""What LARS and LAMB share: which tensors a step touches, in which portions, and under which loss scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
ROW = 8192  #: elements that one float32 sum may run over
#: What a step remembers for `trust_ratios`: groups, their tensors, the ratios on the tensors' device.
Ratios = Sequence[tuple[Group, list[Tensor], Tensor]]


def with_gradients(optimizer: Optimizer) -> list[tuple[Group, list[Tensor]]]:
    """Each group with its parameters that have a gradient; sparse ones are refused before anything is updated."""
    pairs = [(group, [p for p in group["params"] if p.grad is not None]) for group in optimizer.param_groups]
    for group, parameters in pairs:
        for p, g in zip(parameters, gradients(parameters), strict=True):
            if g.is_sparse:
                name = names(group).get(p, "a parameter")
                raise RuntimeError(f"{type(optimizer).__name__}: {name} has a sparse gradient; use sparse=False there")
    return pairs


def refuse_sharded(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise `ValueError` for parameters of which a rank has a part only: the norm of a part is a wrong norm."""
    for p in parameters:
        if hasattr(p, "to_local"):  # a DTensor, recognised without importing torch.distributed
            raise ValueError(
                f"{type(optimizer).__name__} takes norms over whole tensors, and a parameter of shape {tuple(p.shape)} "
                f"is spread over ranks (DTensor, as fully_shard makes them): replicate the model instead"
            )


def gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Their gradients; every parameter is known to have one."""
    return [p.grad for p in parameters if p.grad is not None]


def names(group: Group) -> dict[Tensor, str]:
    """Parameter -> name, where the group knows names."""
    return dict(zip(group["params"], group.get("param_names", ()), strict=False))


def labelled(groups: list[Group], ratios: Ratios) -> dict[str, float]:
    """Parameter name -> ratio; a parameter without a name is called by the place of its group and its own."""
    found: dict[str, float] = {}
    for group, tensors, values in ratios:
        place = next((i for i, g in enumerate(groups) if g["params"] is group["params"]), -1)
        unnamed = {p: f"group{place}.{j}" for j, p in enumerate(group["params"])}
        label = unnamed | names(group)
        found.update(zip((label[t] for t in tensors), values.tolist(), strict=True))
    return found


def by_kind(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Split into lists of one device and dtype, which is what multi-tensor kernels take."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for p in parameters:
        kinds[p.device, p.dtype].append(p)
    yield from kinds.values()


def portions(tensors: list[Tensor]) -> Iterator[slice]:
    """Cut the list into runs no larger than its largest tensor, so that a temporary never copies the whole model."""
    limit = max((t.numel() for t in tensors), default=0)
    start = total = 0
    for i, t in enumerate(tensors):
        if total + t.numel() > limit and i > start:
            yield slice(start, i)
            start, total = i, 0
        total += t.numel()
    yield slice(start, len(tensors))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and updates: float32 for half and bfloat16, else the tensors' own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def norms(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of each tensor, stacked on their device."""
    dtype = wide(tensors[0].dtype)
    if tensors[0].is_cpu and dtype == torch.float32:
        return torch.stack([_norm_by_rows(t) for t in tensors])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def _norm_by_rows(t: Tensor) -> Tensor:
    # torch's CPU kernel carries one float32 sum through the tensor: 0.25 % off at the 37.7 M weights of AlexNet's fc6.
    flat = in_memory_order(t)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest.view(1)]).double())
    return total.float()


def is_dense(t: Tensor) -> bool:
    """Contiguous, or channels-last: every element of the storage range belongs to the tensor."""
    return t.is_contiguous() or _is_channels_last(t)


def same_order(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one shape lie in one memory order; strides of dimensions of size 1 say nothing."""
    if a.stride() == b.stride():
        return True
    return (a.is_contiguous() and b.is_contiguous()) or (_is_channels_last(a) and _is_channels_last(b))


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def in_memory_order(t: Tensor) -> Tensor:
    """A one-dimensional view; a copy if the tensor has gaps."""
    if t.dim() == 1 and t.is_contiguous():
        return t
    return t.as_strided((t.numel(),), (1,)) if is_dense(t) else t.reshape(-1)


@dataclass(frozen=True)
class LossScale:
    """What torch.amp.GradScaler hands to an optimizer that unscales by itself.

    Gradients stay as they are; norms and updates see `gradient * inverse`. `overflow` says on the device whether any
    gradient is infinite or NaN, and then nothing may change: it is applied as a mask, because reading it would make
    the host wait for the device.
    """

    inverse: Tensor | None = None
    overflow: Tensor | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> LossScale:
        """Read what GradScaler left on the optimizer for this step, if anything."""
        scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        return cls(None if scale is None else scale.reciprocal(), None if found is None else found > 0)

    @property
    def idle(self) -> bool:
        """No GradScaler, or one that has nothing left to do."""
        return self.inverse is None and self.overflow is None

    def unscale_(self, tensors: list[Tensor]) -> None:
        """Divide by the loss scale."""
        if self.inverse is not None:
            torch._foreach_mul_(tensors, self.inverse.to(tensors[0].device))

    def cancel_(self, tensors: list[Tensor]) -> None:
        """Zero the tensors after an overflow (a product with zero would keep the NaN)."""
        if self.overflow is not None:
            for t in tensors:
                t.masked_fill_(self.overflow.to(t.device), 0.0)

    def unless_overflow(self, value: float, like: Tensor) -> float | Tensor:
        """`value`, or 1 after an overflow: the factor by which a buffer decays."""
        if self.overflow is None:
            return value
        return torch.where(self.overflow.to(like.device), 1.0, value).to(wide(like.dtype))


def decayed(ws: list[Tensor], gs: list[Tensor], weight_decay: float, maximize: bool, scale: LossScale) -> list[Tensor]:
    """New tensors `g + wd w` (`-g + wd w` to maximize), unscaled, in float32 at least; the gradients stay untouched."""
    if gs[0].dtype == wide(gs[0].dtype) and scale.idle and not maximize:
        return list(torch._foreach_add(gs, ws, alpha=weight_decay))
    ds = [g.to(wide(g.dtype), copy=True) for g in gs]
    scale.unscale_(ds)
    if maximize:
        torch._foreach_neg_(ds)
    torch._foreach_add_(ds, ws, alpha=weight_decay)
    return ds
