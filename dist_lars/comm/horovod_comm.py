"""Ranks that talk through Horovod."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.functional import pad

from dist_lars.comm import mpi
from dist_lars.reducer import Reducer


class HorovodComm:
    """The ranks that horovodrun, mpirun or srun started."""

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.hvd = hvd
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        flat = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        name = f"sum.{'.'.join(values)[:60]}.{len(values)}"  # every rank sends it: of thousands of ranks, not all keys
        total = self.hvd.allreduce(flat, name=name, op=self.hvd.Sum)
        return dict(zip(values, total.tolist(), strict=True))

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        # int32, so that it is never fused with gradients: their sums must not depend on it
        handle = self.hvd.allreduce_async(torch.tensor(values, dtype=torch.int32), name="notes", op=self.hvd.Sum)
        return lambda: self.hvd.synchronize(handle).tolist()

    def average_(self, flat: torch.Tensor, name: str) -> None:
        self.hvd.allreduce_(flat, name=name, op=self.hvd.Average)

    def broadcast_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():  # through a contiguous copy: Horovod refuses channels-last
            tensor.copy_(self.hvd.broadcast(tensor.contiguous(), 0, name=f"broadcast.{name}"))

    def gather(self, value: Any, name: str) -> list[Any]:
        return self.hvd.allgather_object(value, name=f"gather.{name}")

    def broadcast(self, value: Any, name: str) -> Any:
        return self.hvd.broadcast_object(value, 0, name=f"object.{name}")

    def barrier(self) -> None:
        self.hvd.barrier()

    def swap(self, flat: torch.Tensor, other: int | None, name: str) -> None:
        splits = torch.tensor([flat.numel() if r == other else 0 for r in range(self.size)], dtype=torch.int32)
        self.hvd.alltoall(flat, splits, name=name)

    def carrier(self) -> str:
        built = [name.upper() for name in ("mpi", "gloo", "nccl") if getattr(self.hvd, f"{name}_built")()]
        return f"{'MPI' if self.hvd.mpi_enabled() else 'Gloo'} controller; built in {', '.join(built)}"

    def reducer(
        self, parameters: Iterable[nn.Parameter], bucket_mb: float, wire: torch.dtype | None = None
    ) -> Reducer | None:
        if self.size == 1:
            return None
        sums = _Bfloat16Sums(self.hvd) if wire == torch.bfloat16 else None
        start, wait = (sums.start, sums.wait) if sums else (self._start, self.hvd.synchronize)
        return Reducer(parameters, start, wait, self.size, bucket_mb, wire)

    def _start(self, flat: torch.Tensor, name: str) -> Any:
        return self.hvd.allreduce_async_(flat, name=name, op=self.hvd.Sum)

    def abort(self) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        if self.hvd.mpi_enabled():
            mpi.abort()
        os._exit(1)

    def close(self) -> None:
        self.hvd.shutdown()


class _Bfloat16Sums:
    """Sums of bfloat16 tensors, which Horovod cannot add, out of bytes, which it can move.

    Every rank receives its share of all ranks' tensors, adds in float32, rounds once and gives the sum to all: the
    traffic is that of an all-reduce, and the error does not grow with the number of ranks.
    """

    def __init__(self, hvd: Any) -> None:
        self.hvd = hvd
        self.exchanging: list[_Exchange] = []

    def start(self, flat: torch.Tensor, name: str) -> Any:
        for exchange in list(self.exchanging):  # the second half of what has arrived overlaps with backward, too
            if self.hvd.poll(exchange.handle):
                self._collect(exchange)
        if flat.dtype != torch.bfloat16:
            return self.hvd.allreduce_async_(flat, name=name, op=self.hvd.Sum)
        exchange = _Exchange(self.hvd, flat, name)
        self.exchanging.append(exchange)
        return exchange

    def _collect(self, exchange: "_Exchange") -> None:
        self.exchanging.remove(exchange)
        exchange.collect()

    def wait(self, handle: Any) -> None:
        for exchange in list(self.exchanging):
            self._collect(exchange)
        if isinstance(handle, _Exchange):
            handle.finish()
        else:
            self.hvd.synchronize(handle)


class _Exchange:
    """One tensor on its way."""

    def __init__(self, hvd: Any, flat: torch.Tensor, name: str) -> None:
        self.hvd, self.flat, self.name = hvd, flat, name
        whole = pad(flat, (0, -flat.numel() % hvd.size()))
        self.handle = hvd.alltoall_async(whole.view(torch.uint8), name=f"{name}.exchange")

    def collect(self) -> None:
        shares = self.hvd.synchronize(self.handle)[0].view(torch.bfloat16).view(self.hvd.size(), -1)
        share = shares.float().sum(0).bfloat16()
        self.handle = self.hvd.allgather_async(share.view(torch.uint8), name=f"{self.name}.collect")

    def finish(self) -> None:
        self.flat.copy_(self.hvd.synchronize(self.handle).view(torch.bfloat16)[: self.flat.numel()])
