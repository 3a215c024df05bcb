"""Every collective once, and the checks that are made of them."""

from typing import Any

import torch

from dist_lars import comm as ranks
from dist_lars import data, engine
from dist_lars.errors import UserError
from dist_lars.optim import LARS


def error_of(action) -> str:
    try:
        action()
    except UserError as e:
        return f"{type(e).__name__}: {e}"
    return "none"


def evaluation(comm: ranks.Comm, n: int) -> dict:
    """Score n images whose right answers are known: image i is a hit unless 3 divides it."""

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x[:, 0].long() % 7, 7).float()

    mine = data.validation_range(n, comm.rank, comm.size)
    batches = [
        (torch.tensor([[float(i)] for i in keys]), torch.tensor([i % 7 if i % 3 else (i + 1) % 7 for i in keys]))
        for keys in ([i for _, i in batch] for batch in data.ValOrder(mine, 2))
    ]
    return engine.evaluate(Oracle(), batches, comm, torch.device("cpu"), None, expected=n)


def report(comm: ranks.Comm) -> dict[str, Any]:
    r, n = comm.rank, comm.size
    flat = torch.arange(4.0) + r
    comm.average_(flat, "flat")
    image = torch.full((1, 2, 2, 2), float(r + 1)).to(memory_format=torch.channels_last)
    comm.broadcast_({"image": image})

    def refuse():
        raise UserError("only rank 0 looked")

    def refuse_alone():
        if r == n - 1:
            raise UserError("only the last rank looked")

    result = {
        "size": n,
        "local": [comm.local_rank, comm.local_size],
        "sum": comm.sum({"exact": 2**40 + r, "half": 0.5}),
        "average": flat.tolist(),
        "broadcast": image.flatten().tolist(),
        "object": comm.broadcast({"from": r}, "object"),
        "gather": comm.gather(r * r, "squares"),
        "first": ranks.on_first_rank(comm, lambda: f"rank {comm.rank}", "first"),
        "refused": error_of(lambda: ranks.on_first_rank(comm, refuse, "refuse")),
        "alone": error_of(lambda: ranks.on_every_rank(comm, refuse_alone, "refuse alone")),
        "alike": error_of(lambda: ranks.on_every_rank(comm, refuse, "refuse alike")),
        "every": ranks.on_every_rank(comm, lambda: r, "every"),
        "same": error_of(lambda: ranks.assert_same(comm, "lr: 1\nx: 2", "the configuration")),
        "differs": error_of(lambda: ranks.assert_same(comm, f"lr: 1\nx: {min(r, 1)}", "the configuration")),
        "evaluation": {k: evaluation(comm, k) for k in (10, 11, 13)},
        "short": error_of(
            lambda: engine.evaluate(torch.nn.Linear(1, 7), [], comm, torch.device("cpu"), None, expected=5)
        ),
    }
    return result | ({"wrapped": wrapped()} if type(comm).__name__ == "HorovodComm" else {})


def wrapped() -> list:
    """LARS under Horovod's own optimizer wrapper, as people use it alone: every option of its groups survives."""
    import horovod.torch as hvd

    model = torch.nn.Linear(3, 2)
    mine = LARS(model.parameters(), lr=0.7, momentum=0.8, trust_coefficient=0.02, eps=1e-5, weight_decay=1e-3)
    before = [{k: v for k, v in g.items() if k != "params"} for g in mine.param_groups]
    other = hvd.DistributedOptimizer(mine, named_parameters=model.named_parameters())
    after = [{k: v for k, v in g.items() if k != "params"} for g in other.param_groups]
    model(torch.ones(1, 3)).sum().backward()
    other.step()
    return [before, after]
