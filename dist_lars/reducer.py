"""Averaging gradients over ranks in flat buckets while backward is still running.

Why not `hvd.DistributedOptimizer`: see docs/decisions/0004-own-reducer.md.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Start = Callable[[torch.Tensor, str], Any]  # begin averaging a tensor in place over all ranks, returns a handle
Wait = Callable[[Any], None]


class Reducer:
    """Gradients live in flat buckets, filled from the last parameter backwards as backward produces them.

    In the first pass of a step autograd allocates a gradient as usual; a hook copies it to its place in a bucket and
    lets `p.grad` point there, so that later passes accumulate in place and no gradient is ever held twice. In the last
    pass a bucket starts its all-reduce as soon as its last gradient has arrived. Each view has its parameter's strides,
    so channels-last weights get channels-last gradients.

    `passes` is the number of backward calls per step; call `begin()` before the first and `finish()` after the last.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], start: Start, wait: Wait, bucket_mb: float) -> None:
        self.start, self.wait = start, wait
        self.buckets = _fill_buckets([p for p in parameters if p.requires_grad], bucket_mb * 1e6)
        self.handles: list[Any] = []
        self.last_pass = False
        for bucket in self.buckets:
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                p.register_post_accumulate_grad_hook(self._hook(bucket, view))

    def _hook(self, bucket: "_Bucket", view: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def arrived(p: torch.Tensor) -> None:
            if p.grad is not view:
                view.copy_(p.grad)  # type: ignore[arg-type]
                p.grad = view
            if self.last_pass:
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._launch(bucket)

        return arrived

    def _launch(self, bucket: "_Bucket") -> None:
        self.handles.append(self.start(bucket.flat, bucket.name))

    def begin(self) -> None:
        """Forget the gradients of the last step."""
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)
            for p in bucket.parameters:
                p.grad = None

    def finish(self) -> None:
        """Return when every `p.grad` is the mean over all ranks; a parameter without gradient counts as zero."""
        for bucket in self.buckets:
            if bucket.missing:
                for p, view in zip(bucket.parameters, bucket.views, strict=True):
                    if p.grad is not view:
                        view.zero_()
                        p.grad = view
                self._launch(bucket)
        for handle in self.handles:
            self.wait(handle)
        self.handles.clear()
        self.last_pass = False


class _Bucket:
    def __init__(self, name: str, parameters: list[nn.Parameter]) -> None:
        self.name = name
        self.parameters = parameters
        self.missing = len(parameters)
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        pieces = self.flat.split([p.numel() for p in parameters])
        self.views = [piece.as_strided(p.shape, p.stride(), piece.storage_offset())
                      for piece, p in zip(pieces, parameters, strict=True)]  # fmt: skip


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
    return [_Bucket(f"gradients.{i}", group) for i, group in enumerate(groups)]
