"""Small sets held in memory, once per rank: as they lie on disk, or decoded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dist_lars.data.decode import BadImage, Picture, Pixels, decode, open_picture
from dist_lars.data.index import Index
from dist_lars.errors import UserError


@dataclass(frozen=True)
class Held:
    """All images of an index in shared memory, which the workers of the rank map."""

    content: torch.Tensor  # uint8: one image after the other
    ends: torch.Tensor  # int64 [n]
    shapes: torch.Tensor | None  # int32 [n, 2]: height and width of decoded images
    bad: dict[int, str]  # what could not be read or decoded, and why

    def picture(self, i: int) -> Picture:
        """Image i; raises `BadImage`."""
        if i in self.bad:
            raise BadImage(f"image {i}", self.bad[i])
        piece = self.content[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])].numpy()
        if self.shapes is None:
            return open_picture(piece.tobytes())
        height, width = self.shapes[i].tolist()
        return Pixels(piece.reshape(height, width, 3))


def hold(index: Index, what: str, threads: int, limit: float) -> Held:
    """The whole set as `what`, "bytes" or "decoded", read by `threads`; `UserError` above `limit` bytes."""
    pieces: list[np.ndarray] = []
    bad: dict[int, str] = {}
    total = 0
    for i, piece in enumerate(_pieces(index, what, threads)):
        if isinstance(piece, BadImage):
            bad[i] = piece.why
            piece = np.empty((0, 0, 3)[: 1 if what == "bytes" else 3], np.uint8)
        pieces.append(piece)
        total += piece.nbytes
        if 2 * total > limit:  # the pieces, and the copy in one piece
            need = 2 * total * len(index) / (i + 1)
            raise UserError(
                f"data.cache {what}: {len(index):,} images need about {need / 1e9:.1f} GB on this rank, and "
                f"{limit / 1e9:.1f} GB are free for it; use --data.cache none" + " or bytes" * (what == "decoded")
            )
    content = torch.empty(total, dtype=torch.uint8).share_memory_()
    ends = torch.tensor([p.nbytes for p in pieces], dtype=torch.int64).cumsum(0)
    torch.cat([torch.from_numpy(p.reshape(-1)) for p in pieces], out=content)
    shapes = None
    if what == "decoded":
        shapes = torch.tensor([p.shape[:2] for p in pieces], dtype=torch.int32).share_memory_()
    return Held(content, ends.share_memory_(), shapes, bad)


def _pieces(index: Index, what: str, threads: int) -> Iterator[np.ndarray | BadImage]:
    def piece(i: int) -> np.ndarray | BadImage:
        try:
            data = index.read(i)
            return decode(data) if what == "decoded" else np.frombuffer(data, np.uint8).copy()
        except BadImage as e:
            return e

    with ThreadPoolExecutor(threads) as pool:
        for some in _batched(range(len(index)), 64 * threads):  # a bounded number in flight, so that the limit holds
            yield from pool.map(piece, some)


def _batched(numbers: range, size: int) -> Iterator[range]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


class Remembered:
    """Batches that are made once and then come from memory: for images that are the same every time."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.skipped = batches, batches.skipped
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.kept is not None:
            yield from self.kept
            return
        kept = []
        for pixels, labels in self.batches:
            kept.append((pixels.clone(), labels.clone()))  # a worker's tensors hold file descriptors
            yield pixels, labels
        self.kept, self.batches = kept, None  # the workers may go
