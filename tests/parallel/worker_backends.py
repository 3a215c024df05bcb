"""Sums of gradients in each number format of the wire."""

from typing import Any

import torch
from torch import nn

from benchmarks.worker import Ddp
from dist_lars import comm as ranks

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


def beside_ddp(comm: ranks.Comm) -> dict[str, float]:
    """Two passes by our reducer, then the same by the DDP of benchmarks.worker, whose place the reducer had taken."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).double()
    images = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(comm.rank))
    ours = comm.reducer(model.parameters(), 1.0)
    assert ours is not None

    def gradients(reducer: Any, net: torch.nn.Module) -> list[torch.Tensor]:
        reducer.begin()
        for i, batch in enumerate(images):
            reducer.last_pass = i == 1
            (net(batch).square().mean() / reducer.ranks).backward()
        reducer.finish()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(ours, model)
    ddp = Ddp(model, ours, 1.0, torch.device("cpu"))
    found = gradients(ddp, ddp.model)
    return {
        "difference": max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)),
        "size": min(a.abs().max().item() for a in expected),
        "hooks": sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()),
    }


def report(comm: ranks.Comm) -> dict[str, Any]:
    found: dict[str, Any] = {name: sums(comm, wire) for name, wire in WIRES.items()}
    return found | ({"ddp": beside_ddp(comm)} if type(comm).__name__ == "TorchComm" and comm.size > 1 else {})
