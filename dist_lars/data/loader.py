"""From image order to batches: one loader for a whole run, so that no epoch boundary stalls it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_lars.data.order import shard_indices

Key = tuple[int, int]  # (epoch, image)


@dataclass(frozen=True)
class TrainOrder:
    """This rank's micro-batches from optimizer step `start` on, each a list of (epoch, image)."""

    n: int
    seed: int
    rank: int
    size: int
    global_batch: int
    micro_batch: int
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[Key]]:
        steps_per_epoch = self.n // self.global_batch
        epoch, rows = -1, np.empty((0, 0), np.int64)
        for step in range(self.start, self.stop):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                rows = shard_indices(self.n, self.seed, epoch, self.rank, self.size, self.global_batch)
            for micro in rows[step % steps_per_epoch].reshape(-1, self.micro_batch):
                yield [(epoch, int(i)) for i in micro]


@dataclass(frozen=True)
class ValOrder:
    """The images of `indices` once, in order, in batches of at most `batch`."""

    indices: range
    batch: int

    def __iter__(self) -> Iterator[list[Key]]:
        for at in range(0, len(self.indices), self.batch):
            yield [(0, i) for i in self.indices[at : at + self.batch]]


def collate(items: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack to uint8 [N, H, W, 3] and int64 [N]."""
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in items]))
    return pixels, torch.tensor([label for _, label in items], dtype=torch.int64)


def batches(images: Any, order: TrainOrder | ValOrder, workers: int, pin: bool) -> DataLoader:
    """An iterable of (pixels, labels) on the host.

    Workers come from a fork server, never from a fork of this process: forking after MPI has started corrupts memory
    on InfiniBand.
    """
    return DataLoader(
        images,
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_one_thread,
        pin_memory=pin,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
