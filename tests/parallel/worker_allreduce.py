"""Sums, means and a broadcast by Horovod itself, without our Comm; by itself it is one rank of them."""

from typing import Any

import horovod.torch as hvd
import torch
from worker_tools import finish


def report(_: Any = None) -> dict[str, Any]:
    rank = hvd.rank()
    small = hvd.allreduce(torch.tensor([rank + 1.0, 10.0 * rank]), op=hvd.Sum, name="small")
    # Larger than one packet and than Horovod's cycle: every element differs, so a shifted buffer shows.
    large = hvd.allreduce(torch.arange(300_000, dtype=torch.float64) * (rank + 1), op=hvd.Average, name="large")
    many = [hvd.allreduce_async(torch.full((7,), float(i + rank)), op=hvd.Sum, name=f"many.{i}") for i in range(50)]
    return {
        "size": hvd.size(),
        "controller": "mpi" if hvd.mpi_enabled() else "gloo",
        "small": small.tolist(),
        "large": [large[1].item(), large[-1].item()],
        "many": [hvd.synchronize(handle)[3].item() for handle in many],
        "word": hvd.broadcast_object(f"from {rank}", root_rank=hvd.size() - 1, name="word"),
    }


if __name__ == "__main__":
    hvd.init()
    finish(hvd.rank(), report())
    hvd.shutdown()
