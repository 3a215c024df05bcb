"""From image order to batches: one loader for a whole run, so that no epoch boundary stalls it."""

import random
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from dist_lars.data.cache import Remembered
from dist_lars.data.decode import BadImage
from dist_lars.data.index import free_shared_memory
from dist_lars.data.order import shard_indices
from dist_lars.data.process import Worker, settle, start_server
from dist_lars.errors import UserError

Key = tuple[int, int]  # (epoch, image)
PREFETCH = 2  # batches that a worker makes ahead
KEPT = PREFETCH + 2  # and the one in use, and the one before it
ATTEMPTS = 100  # replacements tried for one image before the set counts as broken
PRELOAD = ["dist_lars.data", "dist_lars.cli", "torch.utils.data._utils.worker"]


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


class Flag:
    """What torch needs of multiprocessing's Event, without its lock: a worker that is killed while it looks at an Event
    keeps that lock, and its rank would wait for it for ever, at the next batch or at the end.
    """

    def __init__(self, context: Any) -> None:
        self.value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        """Whether it has been set."""
        return bool(self.value.value)

    def set(self) -> None:
        """For good."""
        self.value.value = 1


class Workers(ForkServerContext):
    """The fork server, with such flags and workers that a signal to their rank does not hit."""

    Process = Worker

    def Event(self) -> Flag:  # type: ignore[override]  # noqa: N802, D102
        return Flag(self)


class Batch(NamedTuple):
    """What a worker sends."""

    pixels: torch.Tensor  # uint8 [N, H, W, 3]
    labels: torch.Tensor  # int64 [N]
    skipped: list[tuple[str, str]]  # files that are no images, and why


@dataclass
class Assembly:
    """Whole batches as the dataset that a worker holds: torch asks it for a list of keys at once.

    Batches take turns in KEPT pieces of memory: the kernel needs longer to find fresh pages than a decoder for a tenth
    of an image.
    """

    images: Any
    pieces: list[torch.Tensor] = field(default_factory=list)  # uint8 [N, H, W, 3], the one used longest ago first

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        """The batch of these keys, or what to tell the user."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # one image is too little work to share: in a training process it took 7 times longer
        try:
            return self._batch(keys)
        except UserError as e:
            return e
        finally:
            torch.set_num_threads(threads)

    def _batch(self, keys: list[Key]) -> Batch:
        pixels = torch.empty(0, dtype=torch.uint8)
        labels: list[int] = []
        skipped: list[tuple[str, str]] = []
        for key in keys:
            item = self._item(key, skipped)
            if item is None:
                continue
            if not labels:
                pixels = self._piece((len(keys), *item[0].shape))
            pixels[len(labels)] = torch.from_numpy(item[0])
            labels.append(item[1])
        return Batch(pixels[: len(labels)], torch.tensor(labels, dtype=torch.int64), skipped)

    def _piece(self, size: tuple[int, ...]) -> torch.Tensor:
        """Memory for a batch; in a worker it is shared from the beginning, so that sending it copies nothing."""
        piece = self.pieces.pop(0) if len(self.pieces) == KEPT else torch.empty(0)
        if piece.shape[1:] != size[1:] or len(piece) < size[0]:
            piece = torch.empty(size, dtype=torch.uint8)
            if get_worker_info() is not None:
                piece.share_memory_()
        self.pieces.append(piece)
        return piece

    def _item(self, key: Key, skipped: list[tuple[str, str]]) -> tuple[np.ndarray, int] | None:
        """The image of this key, or of another that replaces it whatever the rank, worker or epoch; None: leave out."""
        epoch, first = key
        draw = random.Random(f"replace/{first}")
        for _ in range(ATTEMPTS):
            try:
                return self.images[key]
            except BadImage as e:
                if self.images.on_error == "fail":
                    raise UserError(
                        f"cannot read image {e.name}: {e.why}; repair or remove it, or train without it: "
                        f"--data.on_error skip"
                    ) from e
                skipped.append((e.name, e.why))
            if self.images.on_error == "leave_out":
                return None
            key = (epoch, draw.randrange(len(self.images)))
        raise UserError(f"{ATTEMPTS} images in turn could not be read, the last one {skipped[-1][0]}: {skipped[-1][1]}")


class Batches:
    """An iterable of (pixels uint8 [N, H, W, 3], labels int64 [N]) on the host; `skipped` fills as it is read.

    A batch holds until the second one after it is asked for: then its memory may be another's. Whoever keeps it longer
    copies it.
    """

    def __init__(self, loader: DataLoader, limit: int) -> None:
        self.loader, self.limit = loader, limit
        # A worker's piece of memory that is dropped here is unmapped, and mapped again when its turn comes; a pinned
        # batch is a copy, and to keep many of those would take gigabytes that no other process can use.
        self.mapped: deque[torch.Tensor] = deque(maxlen=0 if loader.pin_memory else KEPT * loader.num_workers)
        self.skipped: dict[str, str] = {}  # file -> why it is no image

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        stream = iter(self.loader)
        while True:
            try:
                batch = next(stream)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as e:  # the last two: it died with a batch in its hands
                raise _explained(e, stream) from e
            if isinstance(batch, UserError):
                raise batch
            self._note(batch.skipped)
            self.mapped.append(batch.pixels)
            if len(batch.labels):
                yield batch.pixels, batch.labels

    def _note(self, skipped: list[tuple[str, str]]) -> None:
        self.skipped.update(skipped)
        if len(self.skipped) > self.limit:
            name, why = list(self.skipped.items())[-1]
            raise UserError(
                f"{len(self.skipped)} images could not be read, the last one {name}: {why}; --data.max_skipped "
                f"{self.limit} allows no more: repair the data, or raise it"
            )


def batches(images: Any, order: TrainOrder | ValOrder, workers: int, pin: bool) -> Batches | Remembered:
    """Batches of `images` in `order`, made by `workers` processes (none: by this one), pinned for a GPU if asked.

    `images.on_error` says what becomes of a file that is no image: fail; replace it by another, drawn from its number
    alone, so that every rank keeps equal steps; or leave_out, for validation. At most `images.max_skipped` may be so.

    Workers come from a fork server, never from a fork of this process: forking after MPI has started corrupts memory
    on InfiniBand. The server imports once what all workers need.
    """
    context = Workers() if workers else None
    if context:
        context.set_forkserver_preload(PRELOAD)
        start_server()
    loader: DataLoader = DataLoader(
        Assembly(images),  # type: ignore[arg-type]
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=context,
        worker_init_fn=_settle,
        pin_memory=pin,
    )
    made = Batches(loader, images.max_skipped)
    return Remembered(made) if images.remember else made


def _as_it_is(batch: Any) -> Any:
    return batch


def _settle(_: int) -> None:
    settle()


CAUSES = {
    signal.SIGKILL: "as a rule the machine or job ran out of memory: fewer --data.workers, a smaller --micro_batch, "
    "or more memory for the job (dmesg or `sacct -o MaxRSS` tells)",
    signal.SIGBUS: "as a rule /dev/shm is full, through which batches travel: give the container more (--shm-size), or "
    "use fewer --data.workers",
    signal.SIGSEGV: "a library crashed, as a rule on a broken image file",
}


def _explained(error: Exception, stream: Any) -> Exception:
    """torch says that a worker is gone; its exit code says why."""
    workers = getattr(stream, "_workers", [])
    wait([w.sentinel for w in workers], timeout=1)
    gone = [w for w in workers if w.exitcode]
    if not gone:
        return error
    code = gone[0].exitcode
    if code > 0:
        return UserError(
            f"loader worker {gone[0].pid} ended with exit code {code}: see its own message above. (A Python script "
            f"that trains needs `if __name__ == '__main__':`, for workers import it.)"
        )
    name = signal.Signals(-code).name
    cause = CAUSES.get(signal.Signals(-code), "somebody ended it")
    free = free_shared_memory()
    return UserError(f"loader worker {gone[0].pid} was killed by {name}: {cause}; /dev/shm has {free >> 20} MB free")
