"""Train tiny float64 nets for a few steps on these ranks and report weights, checksums and losses."""

from typing import Any

import numpy as np
import torch
from torch import nn

from dist_lars import comm as ranks
from dist_lars import engine, optim
from dist_lars.config import Config, Log, Optim, Schedule
from dist_lars.data import TrainOrder
from dist_lars.guards import tensor_sums
from dist_lars.metrics import Counts
from dist_lars.plan import make_plan

IMAGES, BATCH, MICRO = 130, 24, 2  # 12 micro-batches a step: 1, 2, 3 and 4 ranks divide them


def net(kind: str) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 16)]
    layers += {"plain": [], "dropout": [nn.Dropout(0.5)], "batchnorm": [nn.BatchNorm1d(16)]}[kind]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 5)).double()


def image(i: int) -> tuple[torch.Tensor, int]:
    rng = np.random.RandomState(i)
    return torch.from_numpy(rng.randn(3, 8, 8)), int(rng.randint(5))


def stream(order: TrainOrder):
    for keys in order:
        pixels, labels = zip(*[image(i + 1000 * epoch) for epoch, i in keys], strict=True)
        yield torch.stack(pixels), torch.tensor(labels)


def job_of(kind: str, comm: ranks.Comm, steps: int, clip: float | None) -> engine.Job:
    epochs = -(-steps // (IMAGES // BATCH))
    config = Config(
        batch_size=BATCH, micro_batch=MICRO, epochs=epochs, optim=Optim(lr=2.0), schedule=Schedule(warmup_epochs=0.4),
        log=Log(),
    )  # fmt: skip
    torch.manual_seed(0)
    model = net(kind)
    law = optim.LAWS["default"]
    groups = optim.param_groups(
        model, weight_decay=1e-3, exclude_from_adaptation=law.exclude_from_adaptation,
        exclude_from_decay=law.exclude_from_decay,
    )  # fmt: skip
    return engine.Job(
        model=model,
        optimizer=optim.build("lars", groups, lr=0.0, momentum=0.9, trust_coefficient=0.01),
        comm=comm,
        reducer=comm.reducer(model.parameters(), bucket_mb=0.004),  # several buckets even here
        plan=make_plan(config, comm.size, IMAGES, 10),
        device=torch.device("cpu"),
        autocast=None,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        seed=11,
        clip_norm=clip,
    )


def train(kind: str, comm: ranks.Comm, steps: int, clip: float | None = None) -> dict[str, Any]:
    job, p = job_of(kind, comm, steps, clip), None
    p = job.plan
    order = TrainOrder(IMAGES, 11, comm.rank, comm.size, BATCH, MICRO, start=0, stop=steps)
    batches, counts, losses, sums = stream(order), Counts(job.device), [], []
    for step in range(steps):
        engine.set_lr(job.optimizer, engine.lr_at(step, p.rate))
        engine.train_step(job, batches, step, counts, engine.Clock())
        total = comm.sum(counts.take())
        losses.append(total["loss"] / total["count"])
        sums.append(tensor_sums(job.model.parameters()))
    weights = [w for parameter in job.model.parameters() for w in parameter.detach().flatten().tolist()]
    means = [b.clone() for b in ranks.float_buffers(job.model)]
    with ranks.averaged_buffers(job.model, comm):
        averaged = [v for b in ranks.float_buffers(job.model) for v in b.tolist()]
    return {
        "accumulation": p.accumulation,
        "buckets": len(job.reducer.buckets) if job.reducer else 0,
        "weights": weights,
        "losses": losses,
        "checksums": sums,
        "buffers": [v for b in means for v in b.tolist()],
        "averaged": averaged,
        "restored": all(torch.equal(a, b) for a, b in zip(means, ranks.float_buffers(job.model), strict=True)),
    }


def start(comm: ranks.Comm) -> dict[str, Any]:
    """Checksums of a net, channels-last weights included, as each rank makes it differently, and as it then starts."""
    torch.manual_seed(comm.rank)
    model = net("batchnorm").to(memory_format=torch.channels_last)
    before = tensor_sums(model.parameters())
    ranks.sync_parameters(model, comm)
    return {"before": before, "after": tensor_sums(model.parameters())}


def report(comm: ranks.Comm) -> dict[str, Any]:
    return {
        "start": start(comm),
        "plain": train("plain", comm, 5),
        "clipped": train("plain", comm, 5, clip=0.1),
        "dropout": train("dropout", comm, 5),
        "batchnorm": train("batchnorm", comm, 20),
    }
