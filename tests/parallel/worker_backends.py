"""Training by one backend, and sums of gradients in each number format of the wire."""

import sys
from typing import Any

import torch
from torch import nn

from dist_lars import comm as ranks
from tests.parallel.worker_equivalence import train
from tests.parallel.worker_tools import finish, join

SHAPES = [(1001,), (7, 3), (40, 50), (1,), (64, 101)]  # some shares are uneven, the last parameter fills a bucket
WIRES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def sums(comm: ranks.Comm, wire: torch.dtype | None) -> dict[str, Any]:
    """Add random gradients up twice: the largest error as a share of the sum of magnitudes, and all sums."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    reducer = comm.reducer(parameters, 0.02, wire)
    random = torch.Generator().manual_seed(comm.rank)
    worst = 0.0
    for _ in range(2):
        gradients = [torch.randn(shape, generator=random) * 10.0 ** (3 - i) for i, shape in enumerate(SHAPES)]
        others = comm.gather(gradients, "gradients")
        if reducer is not None:
            reducer.begin()
            reducer.last_pass = True
        sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True)).backward()
        if reducer is not None:
            reducer.finish()
        for i, p in enumerate(parameters):
            exact = sum(g[i].double() for g in others)
            magnitude = sum(g[i].double().abs() for g in others)
            worst = max(worst, ((p.grad.double() - exact).abs() / magnitude).max().item())
            if reducer is None:
                p.grad = None
    return {"error": worst, "sums": [v for p in parameters if p.grad is not None for v in p.grad.flatten().tolist()]}


def main() -> None:
    torch.set_num_threads(1)
    comm = ranks.LocalComm() if "alone" in sys.argv else join(deterministic=True)
    kinds = {"plain": 5, "dropout": 5, "batchnorm": 5}
    finish(
        comm.rank,
        {
            "backend": type(comm).__name__,
            "trained": {kind: train(kind, comm, steps) for kind, steps in kinds.items()},
            "sums": {name: sums(comm, wire) for name, wire in WIRES.items()},
        },
    )
    comm.close()


if __name__ == "__main__":
    main()
