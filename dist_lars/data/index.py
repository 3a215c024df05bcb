"""Which images there are: a few flat arrays, for a million Python strings cost 200 MB in every process."""

# A Path costs ten times a string, and here are a million of them.
# ruff: noqa: PTH100, PTH112, PTH116, PTH118

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lars.data.decode import BadImage

ARRAYS = ("labels", "names", "ends", "places")
NOWHERE = np.empty((0, 3), np.int64)


@dataclass(frozen=True)
class Index:
    """n images: files below a folder, or pieces of packed shards. Classes are sorted, files sorted within a class."""

    root: str
    classes: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    names: np.ndarray  # uint8: file names within their class folders, UTF-8, one after the other
    ends: np.ndarray  # int64 [n]: where each name ends
    shards: tuple[str, ...] = ()  # file names; none for a folder
    places: np.ndarray = dataclasses.field(default_factory=lambda: NOWHERE)  # int64 [n, 3]: shard, first byte, bytes

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(getattr(self, name).nbytes for name in ARRAYS)

    def name(self, i: int) -> str:
        """CLASS/FILE of image i, as it was called in the image folder."""
        start = self.ends[i - 1] if i else 0
        return os.path.join(self.classes[self.labels[i]], os.fsdecode(self.names[start : self.ends[i]].tobytes()))

    def path(self, i: int) -> str:
        """The file of image i of a folder."""
        return os.path.join(self.root, self.name(i))

    def where(self, i: int) -> str:
        """Image i in words for people: its file, or its shard and its name there."""
        if not self.shards:
            return self.path(i)
        return f"{os.path.join(self.root, self.shards[self.places[i, 0]])} ({self.name(i)})"

    def read(self, i: int) -> bytes:
        """The bytes of image i; raises `BadImage` when the disk refuses."""
        try:
            if not self.shards:
                # One open and one read, where Pillow would seek around on a network file system.
                return Path(self.path(i)).read_bytes()
            shard, first, size = self.places[i].tolist()
            data = os.pread(_descriptor(os.path.join(self.root, self.shards[shard])), size, first)
        except OSError as e:
            raise BadImage(self.where(i), e.strerror or str(e)) from e
        if len(data) != size:
            raise BadImage(self.where(i), f"the shard ends after {len(data)} of its {size} bytes")
        return data

    def subset(self, numbers: np.ndarray) -> "Index":
        """The images of these numbers, in this order."""
        sizes = np.diff(self.ends, prepend=0)[numbers]
        ends = np.cumsum(sizes, dtype=np.int64)
        letters = np.arange(int(sizes.sum())) + np.repeat(self.ends[numbers] - ends, sizes)
        places = self.places[numbers] if len(self.places) else self.places
        return dataclasses.replace(
            self, labels=self.labels[numbers], names=self.names[letters], ends=ends, places=places
        )

    def header(self) -> dict[str, Any]:
        """What is not an array."""
        return {"root": self.root, "classes": self.classes, "shards": self.shards}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    def shared(self) -> "Index":
        """The same index with its arrays in shared memory: worker processes map it instead of copying it."""
        if free_shared_memory() < 4 * self.nbytes:  # a small /dev/shm (containers) is needed for the batches
            return self
        tensors = {name: torch.from_numpy(array).share_memory_() for name, array in self.arrays().items()}
        same = index_of(self.header(), {name: tensor.numpy() for name, tensor in tensors.items()})
        same.__dict__["_tensors"] = tensors
        return same

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.header(), self.__dict__.get("_tensors") or self.arrays())


def index_of(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Index:
    """The way back from `header` and `arrays`."""
    return Index(**{**header, **arrays})


def _rebuilt(header: dict[str, Any], arrays: dict[str, Any]) -> Index:
    index = index_of(header, {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in arrays.items()})
    if isinstance(arrays["labels"], torch.Tensor):
        index.__dict__["_tensors"] = arrays
    return index


@functools.cache
def _descriptor(path: str) -> int:
    """Shards stay open for the life of a process."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def free_shared_memory() -> int:
    """Bytes."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize


def packed_names(names: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(`names`, `ends`) of an Index."""
    ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), dtype=np.int64)
    return np.frombuffer(b"".join(names), np.uint8).copy(), ends
