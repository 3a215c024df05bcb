"""The training loop. Everything comes in as arguments; nothing here knows of files, launchers or configurations."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dist_lars.comm import Comm, averaged_buffers
from dist_lars.data.transforms import normalise
from dist_lars.ema import Ema
from dist_lars.errors import UserError
from dist_lars.metrics import Counts, cross_entropy, means
from dist_lars.plan import Plan
from dist_lars.reducer import Reducer
from dist_lars.runlog import RunLog
from dist_lars.schedule import lr_at

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # pixels uint8 [N, H, W, 3], labels int64 [N]


@dataclass(frozen=True)
class Job:
    """The live parts of one rank's training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    comm: Comm
    reducer: Reducer | None
    plan: Plan
    device: torch.device
    autocast: torch.dtype | None  # number format of forward and backward; None: as the weights are
    scaler: torch.amp.GradScaler  # fp16 only; disabled it passes everything through
    seed: int
    clip_norm: float | None
    label_smoothing: float = 0.0
    ema: Ema | None = None  # running average of weights and float buffers, evaluated in their place


def train(job: Job, batches: Batches, start: int, log: RunLog, every: int, end_of_epoch: Callable[[int], None]) -> None:
    """Run optimizer steps `start` ... `plan.total_steps`; `end_of_epoch(steps done)` evaluates and saves."""
    plan, counts, stream = job.plan, Counts(job.device), iter(batches)
    log.start_bar(start * plan.batch_size, plan.total_steps * plan.batch_size)
    clock = Clock()
    job.model.train()
    for step in range(start, plan.total_steps):
        lr = set_lr(job.optimizer, lr_at(step, plan.rate))
        train_step(job, clock.timed(stream), step, counts)
        if job.ema is not None:
            job.ema.update(step)
        log.advance(plan.batch_size)
        epoch_ends = (step + 1) % plan.steps_per_epoch == 0
        if (step + 1) % every == 0 or epoch_ends:
            report(job, step + 1, lr, counts, clock, log)
        if epoch_ends:
            end_of_epoch(step + 1)
            clock.restart()


def train_step(job: Job, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], step: int, counts: Counts) -> None:
    """One optimizer step on `accumulation` micro-batches of this rank.

    Three places divide: cross-entropy by the micro-batch, this function by the accumulation, the reducer by the ranks;
    all micro-batches have one size, so the gradient is the exact mean over the global batch.
    """
    passes = job.plan.accumulation
    begin(job)
    for i in range(passes):
        pixels, labels = to_device(next(stream), job.device)
        seed_dropout(job.seed, step, job.comm.rank * passes + i)
        with autocast(job):
            logits = job.model(as_input(pixels, job.model))
            loss = cross_entropy(logits, labels, job.label_smoothing)
        if job.reducer is not None:
            job.reducer.last_pass = i == passes - 1
        job.scaler.scale(loss / passes).backward()
        counts.add(loss, logits, labels)
    if job.reducer is not None:
        job.reducer.finish()
    if job.clip_norm is not None:
        job.scaler.unscale_(job.optimizer)
        nn.utils.clip_grad_norm_(job.model.parameters(), job.clip_norm)
    job.scaler.step(job.optimizer)
    job.scaler.update()


def begin(job: Job) -> None:
    """Forget the last step's gradients."""
    if job.reducer is None:
        job.optimizer.zero_grad()
    else:
        job.reducer.begin()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Write the step's learning rate into every group, times the group's own `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout a function of (seed, step, global micro-batch number), hence independent of the ranks."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


def to_device(batch: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Start the copies; from pinned memory they overlap with computing."""
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


def as_input(pixels: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Images as the network takes them; float tensors pass through."""
    return normalise(pixels, next(model.parameters()).dtype) if pixels.dtype == torch.uint8 else pixels


def autocast(job: Job) -> contextlib.AbstractContextManager[None]:
    """Forward in the job's number format."""
    return autocast_to(job.device, job.autocast)


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    """torch.autocast, or nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def evaluated_weights(job: Job) -> contextlib.AbstractContextManager[None]:
    """Inside, the model holds what is evaluated: the running average of its weights where the job keeps one."""
    return contextlib.nullcontext() if job.ema is None else job.ema.swapped()


def report(job: Job, steps_done: int, lr: float, counts: Counts, clock: "Clock", log: RunLog) -> None:
    """Sum the interval over ranks (one collective) and say it."""
    seconds, waited = clock.lap()
    sums = job.comm.sum(counts.take() | {"waited": waited})
    speed = sums["count"] / seconds
    values = means(sums)
    log.advance(0, loss=values["loss"], top1=values["top1"], lr=lr)
    log.line(
        "train",
        step=steps_done,
        epoch=steps_done / job.plan.steps_per_epoch,
        lr=lr,
        **values,
        images_per_s=speed,
        data_wait=sums["waited"] / job.comm.size / seconds,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, comm: Comm, device: torch.device, dtype: torch.dtype | None, expected: int
) -> dict[str, float]:
    """Loss, top-1 and top-5 (percent) over `expected` images of all ranks together, with averaged buffers."""
    counts = Counts(device)
    model.eval()
    with averaged_buffers(model, comm), autocast_to(device, dtype):
        for batch in batches:
            pixels, labels = to_device(batch, device)
            logits = model(as_input(pixels, model))
            counts.add(cross_entropy(logits, labels), logits, labels)
    model.train()
    values = means(comm.sum(counts.take()))
    if values["count"] != expected:
        raise UserError(f"evaluation saw {values['count']} images instead of {expected}: ranks hold different data")
    return values


class Clock:
    """Wall-clock seconds of an interval, and those of them spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.since, self.waited = time.perf_counter(), 0.0

    def timed(self, stream: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same stream, its waiting time added up."""
        while True:
            before = time.perf_counter()
            batch = next(stream)
            self.waited += time.perf_counter() - before
            yield batch

    def lap(self) -> tuple[float, float]:
        """(seconds, of them waited) since the last lap."""
        seconds, waited = time.perf_counter() - self.since, self.waited
        self.restart()
        return seconds, waited
