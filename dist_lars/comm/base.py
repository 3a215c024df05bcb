"""What the trainer needs of its ranks, and the job of one process."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import nn

from dist_lars.reducer import Reducer

T = TypeVar("T")


class Comm(Protocol):
    """What the trainer needs of its ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add numbers over ranks in float64 (exact for counts below 2^53): one collective."""

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        """Begin to add small integers over ranks; the returned function waits for the sums. One at a time."""

    def average_(self, flat: torch.Tensor, name: str) -> None:
        """Replace a tensor by its mean over ranks."""

    def broadcast_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace tensors by rank 0's."""

    def gather(self, value: Any, name: str) -> list[Any]:
        """Every rank's value, on every rank, in order of rank."""

    def broadcast(self, value: Any, name: str) -> Any:
        """Rank 0's value."""

    def barrier(self) -> None:
        """Return when all ranks have called."""

    def swap(self, flat: torch.Tensor, other: int | None, name: str) -> None:
        """Exchange a tensor with rank `other`; every rank calls, with None and an empty one where it only looks on."""

    def carrier(self) -> str:
        """What carries the ranks' words, for people."""

    def reducer(
        self, parameters: Iterable[nn.Parameter], bucket_mb: float, wire: torch.dtype | None = None
    ) -> Reducer | None:
        """What adds up the gradients of this job, sent as `wire` (None: as they are); None with nothing to add."""

    def abort(self) -> NoReturn:
        """End all ranks of the job at once with exit code 1."""

    def close(self) -> None:
        """Leave the job in order."""


class LocalComm:
    """One process: every collective is the identity."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        return {k: float(v) for k, v in values.items()}

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        return lambda: values

    def average_(self, flat: torch.Tensor, name: str) -> None:
        pass

    def broadcast_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass

    def gather(self, value: Any, name: str) -> list[Any]:
        return [value]

    def broadcast(self, value: T, name: str) -> T:
        return value

    def barrier(self) -> None:
        pass

    def swap(self, flat: torch.Tensor, other: int | None, name: str) -> None:
        pass

    def carrier(self) -> str:
        return ""

    def reducer(
        self, parameters: Iterable[nn.Parameter], bucket_mb: float, wire: torch.dtype | None = None
    ) -> Reducer | None:
        return None

    def abort(self) -> NoReturn:
        os._exit(1)

    def close(self) -> None:
        pass
