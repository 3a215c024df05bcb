"""The bare loop of `benchmarks.trainer`: what a trainer can at best be. Rank 0 prints `SPEED images/s`.

    python -m benchmarks.trainer_bare BATCH STEPS none|reducer|wrapper true|false

The third word is who averages the gradients: nobody, our `Reducer`, or `hvd.DistributedOptimizer`; the fourth is
whether weights are channels-last, which the wrapper refuses.
"""

import sys
import time
from collections.abc import Callable

import torch

from dist_lars import comm as ranks
from dist_lars import models, optim
from dist_lars.resources import keep_memory, pick_autocast


def main(batch: int, steps: int, averaging: str, channels_last: bool) -> None:
    """Forward, backward, averaging and LARS step on one batch that is already there."""
    torch.set_num_threads(1)
    keep_memory(torch.device("cpu"))
    comm = ranks.LocalComm() if averaging == "none" else ranks.start(cpu=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = models.build("resnet18", num_classes=320).to(memory_format=layout)  # type: ignore[call-overload]
    step = make_step(model, batch, averaging, comm)
    for _ in range(6):
        step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    speed = comm.sum({"speed": batch * steps / (time.perf_counter() - began)})["speed"]
    if comm.rank == 0:
        print("SPEED", speed, flush=True)
    comm.close()


def make_step(model: torch.nn.Module, batch: int, averaging: str, comm: ranks.Comm) -> Callable[[], None]:
    """One training step as a function of nothing."""
    groups = optim.param_groups(model, weight_decay=5e-4, exclude_from_adaptation="none", exclude_from_decay="none")
    optimizer = optim.build("lars", groups, lr=0.1)
    reducer = comm.reducer(model.parameters(), 25.0) if averaging == "reducer" else None
    if averaging == "wrapper":
        import horovod.torch as hvd  # type: ignore[import-untyped]

        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.arange(batch)
    dtype = pick_autocast("auto", torch.device("cpu"))

    def step() -> None:
        if reducer is None:
            optimizer.zero_grad()
        else:
            reducer.begin()
            reducer.last_pass = True
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        (loss if reducer is None else loss / reducer.ranks).backward()
        if reducer is not None:
            reducer.finish()
        optimizer.step()

    return step


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "true")
