"""What ranks do together, built on the collectives of `Comm`.

Every collective is called by all ranks in the same order; that is what keeps a job from hanging.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from dist_lars.comm.base import Comm
from dist_lars.errors import AgreedError, UserError

T = TypeVar("T")


def on_first_rank(comm: Comm, action: Callable[[], T], name: str) -> T:
    """Run `action` on rank 0 and give its result to all ranks; a `UserError` there is raised on all of them."""
    outcome: tuple[bool, Any] = (True, None)
    if comm.rank == 0:
        try:
            outcome = (True, action())
        except UserError as e:
            outcome = (False, str(e))
    good, value = comm.broadcast(outcome, name)
    if not good:
        raise AgreedError(value)
    return value


def patiently(comm: Comm, acts: bool, action: Callable[[], T], name: str) -> T | None:
    """Run `action` on the ranks where `acts`, for as long as it takes; its result there, None on the others.

    The ranks that wait keep talking to each other, for Horovod ends a job whose ranks wait ten minutes in a collective.
    A `UserError` of any rank is raised on all of them.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action) if acts else None
        pause = 0.001
        while comm.sum({"busy": float(future is not None and not future.done())})["busy"]:
            time.sleep(pause)
            pause = min(0.2, 2 * pause)
    error = future.exception() if future else None
    _refuse_together(comm, f"{error}" if isinstance(error, UserError) else None, name)
    return future.result() if future else None


def on_every_rank(comm: Comm, action: Callable[[], T], name: str) -> T:
    """Run `action`, which calls no collective, on all ranks; a `UserError` of any of them is raised on all."""
    try:
        result = action()
    except UserError as e:
        _refuse_together(comm, str(e), name)
        raise
    _refuse_together(comm, None, name)
    return result


def _refuse_together(comm: Comm, text: str | None, name: str) -> None:
    """Raise on all ranks what any of them has to say, with rank and host unless all say the same."""
    said = comm.gather(None if text is None else (text, socket.gethostname()), name)
    told = [f"{s[0]} (on rank {r}, {s[1]})" for r, s in enumerate(said) if s is not None]
    if told and len({s and s[0] for s in said}) == 1:
        raise AgreedError(said[0][0])
    if told:
        raise AgreedError(told[0] + f"; and {len(told) - 1} more failed" * (len(told) > 1))


def assert_same(comm: Comm, text: str, what: str) -> None:
    """Refuse to go on when ranks disagree about `what`, naming the ranks and the first difference."""
    digests = comm.gather(hashlib.sha256(text.encode()).hexdigest(), f"{what} digest")
    if len(set(digests)) == 1:
        return
    texts = comm.gather(text.splitlines(), f"{what} text")
    odd = next(r for r in range(comm.size) if digests[r] != digests[0])
    pairs = [(a, b) for a, b in zip(texts[0], texts[odd], strict=False) if a != b]
    first = f": {pairs[0][0].strip()!r} on rank 0, {pairs[0][1].strip()!r} on rank {odd}" if pairs else ""
    ranks = ", ".join(str(r) for r in range(comm.size) if digests[r] != digests[0])
    raise AgreedError(f"{what} of rank {ranks} differs from rank 0's{first}; all ranks must be started alike")


def sync_parameters(model: nn.Module, comm: Comm) -> None:
    """Give every rank rank 0's parameters; buffers stay each rank's own."""
    with torch.no_grad():
        comm.broadcast_(dict(model.named_parameters()))


def float_buffers(model: nn.Module) -> list[torch.Tensor]:
    """The buffers that ranks gather for themselves while training: BatchNorm's running statistics."""
    return [b for b in model.buffers() if b.is_floating_point()]


@contextmanager
def averaged_buffers(model: nn.Module, comm: Comm) -> Iterator[None]:
    """Inside, BatchNorm's running statistics are their mean over ranks; outside, every rank keeps its own."""
    buffers = float_buffers(model)
    own = pack(buffers)
    mean = own.clone()
    comm.average_(mean, "buffers")
    unpack(mean, buffers)
    try:
        yield
    finally:
        unpack(own, buffers)


def pack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors' values in one flat float64 vector (exact for every smaller float)."""
    return torch.cat([t.detach().reshape(-1).double() for t in tensors] or [torch.zeros(0, dtype=torch.float64)])


def unpack(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Write the values of `pack` back."""
    with torch.no_grad():
        for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(piece.view_as(t))
