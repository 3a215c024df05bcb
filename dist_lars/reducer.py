"""Adding up gradients over ranks in flat buckets while backward is still running.

Why not `hvd.DistributedOptimizer`: see docs/decisions/0004-own-reducer.md.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Start = Callable[[torch.Tensor, str], Any]  # begin adding a flat tensor up in place over all ranks, returns a handle
Wait = Callable[[Any], Any]


class Reducer:
    """Gradients live in flat buckets, filled from the last parameter backwards as backward produces them.

    In the first pass of a step autograd allocates a gradient as usual; a hook copies it to its place in a bucket and
    lets `p.grad` point there, so that later passes accumulate in place and no gradient is ever held twice. A parameter
    as large as a bucket needs none: its gradient is sent from where it lies. In the last pass a bucket starts its
    all-reduce as soon as its last gradient has arrived and the buckets before it have started, hence in the same order
    on all ranks. Each view has its parameter's strides, so channels-last weights get channels-last gradients.

    The gradients of `ranks` ranks are added, not averaged: the loss is divided by `ranks` before, which costs nothing,
    while a division of the sums would read and write all of them once more. `wire` is the number format of float32
    gradients on their way. `passes` is the number of backward calls per step; call `begin()` before the first and
    `finish()` after the last.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        start: Start,
        wait: Wait,
        ranks: int,
        bucket_mb: float,
        wire: torch.dtype | None = None,
    ) -> None:
        self.start, self.wait, self.ranks, self.wire = start, wait, ranks, wire
        self.buckets = _fill_buckets([p for p in parameters if p.requires_grad], bucket_mb * 1e6)
        self.sent: list[tuple[Any, torch.Tensor, torch.Tensor]] = []  # handle, gradients, what travels
        self.last_pass = False
        self.hooks = [p.register_post_accumulate_grad_hook(self._hook(b)) for b in self.buckets for p in b.parameters]

    def _hook(self, bucket: "_Bucket") -> Callable[[torch.Tensor], None]:
        def arrived(p: torch.Tensor) -> None:
            bucket.take(p)
            if self.last_pass:
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._launch()

        return arrived

    def _launch(self) -> None:
        """Start every bucket that is full and has no unfilled one before it."""
        for bucket in self.buckets[len(self.sent) :]:
            if bucket.missing:
                return
            flat = bucket.gradients()
            travels = flat if self.wire is None or flat.dtype != torch.float32 else flat.to(self.wire)
            self.sent.append((self.start(travels, bucket.name), flat, travels))

    def begin(self) -> None:
        """Forget the gradients of the last step."""
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)
            for p in bucket.parameters:
                p.grad = None

    def finish(self) -> None:
        """Return when every `p.grad` is the sum over all ranks; a parameter without gradient counts as zero."""
        for bucket in self.buckets:
            if bucket.missing:
                for p in bucket.parameters:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    bucket.take(p)
                bucket.missing = 0
        self._launch()
        for handle, flat, travels in self.sent:
            self.wait(handle)
            if travels is not flat:
                flat.copy_(travels)
        self.sent.clear()
        self.last_pass = False


class _Bucket:
    def __init__(self, name: str, parameters: list[nn.Parameter], large: bool) -> None:
        self.name = name
        self.parameters = parameters
        self.missing = len(parameters)
        self.flat: torch.Tensor | None = None  # a large parameter's gradient is sent as it is
        self.views: dict[torch.Tensor, torch.Tensor] = {}
        if large:
            return
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        pieces = self.flat.split([p.numel() for p in parameters])
        self.views = {p: piece.as_strided(p.shape, p.stride(), piece.storage_offset())
                      for piece, p in zip(pieces, parameters, strict=True)}  # fmt: skip

    def take(self, p: torch.Tensor) -> None:
        """Move a gradient to where it travels from."""
        if self.flat is None:
            if p.grad.stride() != p.stride():  # type: ignore[union-attr]
                p.grad = torch.empty_like(p).copy_(p.grad)  # type: ignore[arg-type]
            return
        view = self.views[p]
        if p.grad is not view:
            view.copy_(p.grad)  # type: ignore[arg-type]
            p.grad = view

    def gradients(self) -> torch.Tensor:
        """All of them, flat, as they lie in memory."""
        if self.flat is not None:
            return self.flat
        grad: torch.Tensor = self.parameters[0].grad  # type: ignore[assignment]
        return grad.as_strided((grad.numel(),), (1,))


def _fill_buckets(parameters: list[nn.Parameter], limit: float) -> list[_Bucket]:
    """Buckets of about `limit` bytes in reverse order of the parameters, one dtype and device each.

    The first bucket is small, so that communication starts early in backward.
    """
    groups: list[list[nn.Parameter]] = []
    room = 0.0
    for p in reversed(parameters):
        size = p.numel() * p.element_size()
        same = bool(groups) and (groups[-1][0].dtype, groups[-1][0].device) == (p.dtype, p.device)
        if not same or room < size:
            groups.append([])
            room = limit if len(groups) > 1 else limit / 10
        groups[-1].append(p)
        room -= size
    return [_Bucket(f"gradients.{i}", group, _large(group, limit)) for i, group in enumerate(groups)]


def _large(group: list[nn.Parameter], limit: float) -> bool:
    return len(group) == 1 and group[0].numel() * group[0].element_size() >= limit
