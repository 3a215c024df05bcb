"""The training loop. Everything comes in as arguments; nothing here knows of files, launchers or configurations."""

import contextlib
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from dist_lars.comm import Comm, averaged_buffers
from dist_lars.data.transforms import normalise
from dist_lars.ema import Ema
from dist_lars.errors import UserError
from dist_lars.guards import gradient_norm
from dist_lars.metrics import Counts, cross_entropy, means
from dist_lars.plan import Plan
from dist_lars.reducer import Reducer
from dist_lars.runlog import RunLog
from dist_lars.schedule import lr_at

Batch = tuple[torch.Tensor, torch.Tensor]  # pixels uint8 [N, H, W, 3], labels int64 [N]
Batches = Iterable[Batch]


class Hooks(Protocol):
    """What the owner of a run does between two steps, on all ranks alike."""

    @property
    def lr_factor(self) -> float:
        """Of the scheduled learning rate; below 1 after a roll-back."""

    def after_step(self, step: int, norm: float) -> None:
        """`step` steps are done, the last with a gradient of this norm: check, evaluate, save."""

    def loss(self, step: int, loss: float) -> None:
        """The mean loss since the last call."""


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


def train(job: Job, batches: Batches, start: int, counts: Counts, log: RunLog, every: int, hooks: Hooks) -> None:
    """Run optimizer steps `start` ... `plan.total_steps`, telling `hooks` after each; they may raise to end it."""
    plan, clock = job.plan, Clock()
    stream = clock.timed(iter(batches))
    log.start_bar(start * plan.batch_size, plan.total_steps * plan.batch_size)
    job.model.train()
    for step in range(start, plan.total_steps):
        lr = set_lr(job.optimizer, hooks.lr_factor * lr_at(step, plan.rate))
        norm = train_step(job, stream, step, counts, clock)
        log.advance(plan.batch_size)
        if (step + 1) % every == 0 or (step + 1) % plan.steps_per_epoch == 0:
            hooks.loss(step + 1, report(job, step + 1, lr, norm, counts, clock, log))
        with clock.paused():
            hooks.after_step(step + 1, norm)


def train_step(job: Job, stream: Iterator[Batch], step: int, counts: Counts, clock: "Clock") -> float:
    """One optimizer step on `accumulation` micro-batches of this rank; the norm of the averaged gradient.

    Two places divide: cross-entropy by the micro-batch, this function by the passes of all ranks together; the reducer
    adds. All micro-batches have one size, so the gradient is the exact mean over the global batch. Where its norm is
    not finite, which all ranks see alike, the weights are left as they are.
    """
    passes, before = job.plan.accumulation, counts.sums.clone()
    parts = passes * (1 if job.reducer is None else job.reducer.ranks)
    begin(job)
    for i in range(passes):
        pixels, labels = to_device(next(stream), job.device)
        seed_dropout(job.seed, step, job.comm.rank * passes + i)
        with autocast(job):
            logits = job.model(as_input(pixels, job.model))
            loss = cross_entropy(logits, labels, job.label_smoothing)
        if job.reducer is not None:
            job.reducer.last_pass = i == passes - 1
        job.scaler.scale(loss / parts).backward()
        counts.add(loss, logits, labels)
    if job.reducer is not None:
        with clock.communicating(job.device):
            job.reducer.finish()
    job.scaler.unscale_(job.optimizer)
    norm = gradient_norm(job.model.parameters())
    finite = math.isfinite(norm)
    if finite and job.clip_norm is not None:
        clip(job.model.parameters(), job.clip_norm, norm)
    if finite or job.scaler.is_enabled():  # the scaler skips an overflow by itself, and lowers its scale
        job.scaler.step(job.optimizer)
        job.scaler.update()
    if not finite:
        counts.sums.copy_(before)
    elif job.ema is not None:
        job.ema.update(step)
    return norm


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: float) -> None:
    """Scale the gradients, whose global norm is `norm`, down to `limit`."""
    nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm, dtype=torch.float64))


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
    """Start the copies; from pinned memory the host does not wait for them."""
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


def report(job: Job, steps_done: int, lr: float, norm: float, counts: Counts, clock: "Clock", log: RunLog) -> float:
    """Sum the interval over ranks (one collective) and say it; the mean loss.

    A straggler shows as the rank that spends most of the interval on its own work: the others wait for it.
    """
    lap, ranks = clock.lap(), range(job.comm.size)
    own = {"busy": lap.seconds - lap.communicated, "waited": lap.waited}
    told = {f"{what}.{r}": value if r == job.comm.rank else 0.0 for what, value in own.items() for r in ranks}
    sums = job.comm.sum(counts.take() | told)
    values = means(sums)
    busy, waited = ([sums[f"{what}.{r}"] for r in ranks] for what in own)
    slowest = busy.index(max(busy))
    wait = sum(waited) / job.comm.size / lap.seconds
    log.advance(0, loss=values["loss"], top1=values["top1"], lr=lr, data_wait=wait)
    log.line(
        "train",
        step=steps_done,
        epoch=steps_done / job.plan.steps_per_epoch,
        lr=lr,
        **values,
        gradient_norm=norm if math.isfinite(norm) else None,
        images_per_s=sums["count"] / lap.seconds,
        data_wait=wait,
        slowest_rank=slowest,
        slowest_host=log.hosts[slowest] if log.hosts else None,
        slowest_ratio=busy[slowest] / max(statistics.median(busy), 1e-9),
        slowest_data_wait=waited[slowest] / lap.seconds,
    )
    log.waited(wait)
    return values["loss"]


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, comm: Comm, device: torch.device, dtype: torch.dtype | None, expected: int,
    left_out: Callable[[], int] = lambda: 0,
) -> dict[str, float]:  # fmt: skip
    """Loss, top-1 and top-5 (percent) over `expected` images of all ranks together, with averaged buffers.

    `left_out`, asked at the end, says how many of this rank's images were not images after all.
    """
    counts, was_training = Counts(device), model.training
    model.eval()
    with averaged_buffers(model, comm), autocast_to(device, dtype):
        for batch in batches:
            pixels, labels = to_device(batch, device)
            logits = model(as_input(pixels, model))
            counts.add(cross_entropy(logits, labels), logits, labels)
    model.train(was_training)
    sums = comm.sum(counts.take() | {"left_out": float(left_out())})
    values = means(sums)
    if values["count"] + sums["left_out"] != expected:
        raise UserError(f"evaluation saw {values['count']} images instead of {expected}: ranks hold different data")
    return values


def finish_queued(device: torch.device) -> None:
    """Wait for what this rank has queued on its GPU; CPUs queue nothing."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Lap(NamedTuple):
    """Seconds of an interval: all of them, those spent waiting for data, those waiting for other ranks."""

    seconds: float
    waited: float
    communicated: float


class Clock:
    """Where the time of an interval goes."""

    def __init__(self) -> None:
        self.since, self.waited, self.communicated = time.perf_counter(), 0.0, 0.0

    def lap(self) -> Lap:
        """What has passed since the last lap, and start again."""
        done = Lap(time.perf_counter() - self.since, self.waited, self.communicated)
        self.since, self.waited, self.communicated = time.perf_counter(), 0.0, 0.0
        return done

    def timed(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The same stream, its waiting time added up."""
        while True:
            before = time.perf_counter()
            batch = next(stream)
            self.waited += time.perf_counter() - before
            yield batch

    @contextlib.contextmanager
    def communicating(self, device: torch.device) -> Iterator[None]:
        """Inside, this rank waits for the others; what it has asked of its GPU before is its own work."""
        finish_queued(device)
        before = time.perf_counter()
        yield
        finish_queued(device)  # NCCL makes the GPU wait, not the host
        self.communicated += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the time belongs to nobody: saving and evaluating are not training."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before
