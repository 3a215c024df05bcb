"""One rank of a `benchmarks.group.Group`: does what it is told, and tells how long each part took.

    python -m benchmarks.worker '{"task": "train", "carrier": "horovod", "model": "resnet18", ...}'

Trainings go through `dist_lars.engine.train`, with its own job, input and optimizer, so that what is timed is the
trainer and not a loop that looks like it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
from torch import nn

from benchmarks import record, worker_parts
from benchmarks.group import die_with_parent
from benchmarks.scaling_results import PARTS
from dist_lars import api, data, engine, inputs
from dist_lars import comm as ranks
from dist_lars.cli import load_config
from dist_lars.config import Config
from dist_lars.launchers import place_of
from dist_lars.metrics import Counts
from dist_lars.plan import make_plan
from dist_lars.reducer import Reducer
from dist_lars.resources import cores_per_rank, pick_autocast, pick_device, use_cores
from dist_lars.runlog import RunLog


class Finished(Exception):
    """There is nothing more to do."""


class Watch:
    """Where the seconds of a step go: each mark says what follows. `cpu` are those of all threads together."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.apart = synchronize, False
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.what, self.since, self.cpu = "rest", time.perf_counter(), time.process_time()
        self.backward_ended = 0.0

    def mark(self, what: str) -> None:
        """From now on it is `what`; a device is waited for only where the parts are asked for."""
        if self.apart:
            self.synchronize()
        if what == "wait":
            self.backward_ended = time.time()  # as Horovod's timeline counts
        now = time.perf_counter()
        self.seconds[self.what] += now - self.since
        self.what, self.since = what, now


class Turns:
    """The engine's hooks: after each step note its time, after the last one of a turn answer and wait for the next."""

    lr_factor = 1.0

    def __init__(self, connection: Connection, job: engine.Job, watch: Watch, timeline: str) -> None:
        self.connection, self.job, self.comm, self.watch, self.timeline = connection, job, job.comm, watch, timeline
        self.steps: list[dict[str, float]] = []
        self.beside = contextlib.ExitStack()  # what goes on during this turn
        self.answer: Callable[[], Any] = list

    def begin(self) -> None:
        """Wait for a turn; a request without steps is answered on the spot."""
        while "steps" not in (work := self._told()):
            self.connection.send(worker_parts.answer(self.job, work))
        self.left, self.watch.apart, self.steps = work["steps"], work.get("apart", True), []
        self.answer = lambda: self.steps
        if work.get("timeline"):
            self.beside.enter_context(worker_parts.horovod_timeline(self.timeline))
        if work.get("layers"):
            layers = worker_parts.Layers(self.job.model, self.watch.synchronize)
            self.beside.enter_context(layers.attached())
            self.answer = lambda: layers.rows(self.steps)
        self._next()

    def _told(self) -> dict[str, Any]:
        work = self.connection.recv()
        if work is None:
            raise Finished
        return work

    def _next(self) -> None:
        if not self.steps:
            self.comm.barrier()  # nobody's first step waits for another to be woken
        self.notes = self.comm.sum_later([0, 0])  # as the trainer's ranks ask each other whether to stop
        self.watch.restart()

    def after_step(self, step: int, norm: float) -> None:
        """`step` steps are done."""
        self.notes()
        self.watch.synchronize()
        self.watch.mark("rest")
        self.steps.append(
            {**self.watch.seconds, "cpu": time.process_time() - self.watch.cpu, "ended": self.watch.backward_ended}
        )
        self.left -= 1
        if self.left:
            self._next()
        else:
            self.beside.close()
            self.connection.send(self.answer())
            self.begin()

    def loss(self, step: int, loss: float) -> None:
        """Nobody asks here."""


class MarkedCounts(Counts):
    """Counting begins when backward has ended."""

    def __init__(self, device: torch.device, watch: Watch) -> None:
        super().__init__(device)
        self.watch = watch

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.watch.mark("rest")
        super().add(loss, logits, labels)


class Ddp:
    """torch's DistributedDataParallel in the place of our reducer, `ours`: it averages by itself, inside backward."""

    ranks = 1  # what the loss is divided by for it

    def __init__(self, model: nn.Module, ours: Reducer, bucket_mb: float, place: torch.device) -> None:
        for hook in ours.hooks:  # it would copy every gradient once more
            hook.remove()
        self.model = nn.parallel.DistributedDataParallel(
            model, device_ids=[place.index] if place.type == "cuda" else None, bucket_cap_mb=bucket_mb,
            broadcast_buffers=False, gradient_as_bucket_view=True,
        )  # fmt: skip

    @property
    def last_pass(self) -> bool:
        """Whether the next backward averages."""
        return self.model.require_backward_grad_sync

    @last_pass.setter
    def last_pass(self, value: bool) -> None:
        self.model.require_backward_grad_sync = value

    def begin(self) -> None:
        """Forget the last gradients."""
        for p in self.model.parameters():
            p.grad = None

    def finish(self) -> None:
        """Backward has done it."""


def make_config(job: dict[str, Any], size: int) -> Config:
    """The options of a training: a synthetic epoch never ends."""
    batch = job["batch"] * job["accumulation"] * size
    options = {
        "model.name": job["model"], "micro_batch": job["batch"], "batch_size": batch, "epochs": 1000,
        "schedule.warmup_epochs": 0, "optim.lr": 0.01, "comm.wire": job["wire"], "log.tensorboard": False,
        "comm.backend": "torch" if job["carrier"] in ("torch", "ddp") else "horovod",
    }  # fmt: skip
    if job.get("images"):
        options |= {"data.path": job["images"]}
    else:
        options |= {"data.kind": "synthetic", "data.train_images": batch * 10_000, "data.classes": 1000}
    return load_config(overrides={**options, **job.get("options", {})})


def start(job: dict[str, Any]) -> tuple[ranks.Comm, Config]:
    """Join the others; ranks that are independent join nobody."""
    place = place_of(os.environ)
    config = make_config(job, 1)
    comm = ranks.LocalComm() if job["carrier"] == "none" else api.start_ranks(config)
    size = 1 if job["carrier"] == "none" else comm.size
    if place and job["carrier"] != "none" and place.size != comm.size:
        raise SystemExit(f"{place.size} ranks were started, {comm.size} found each other")
    return comm, make_config(job, size)


def train(job: dict[str, Any], connection: Connection) -> None:
    """Train in turns."""
    comm, config = start(job)
    place = place_of(os.environ)
    device = pick_device(config.device, place.local_rank if place else 0)
    workers, threads = use_cores(_cores(comm, place), device, config.data.workers)
    autocast = pick_autocast(config.precision, device)
    sets = inputs.open_sets(config, comm) if job.get("images") else None
    classes = len(sets.classes) if sets else config.data.classes
    plan = make_plan(config, comm.size, len(sets.train) if sets else config.data.train_images, 1)
    torch.manual_seed(config.seed)
    made = api.make_job(config, comm, plan, classes, device, autocast)
    ranks.sync_parameters(made.model, comm)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    watch = Watch(synchronize)
    model, reducer = made.model, made.reducer
    if job["carrier"] == "ddp":
        reducer = Ddp(made.model, made.reducer, config.comm.bucket_mb, device)  # type: ignore[arg-type, assignment]
        model = reducer.model  # type: ignore[union-attr]
    marked = engine.Job(**{**vars(made), "model": model, "reducer": reducer})
    put_marks(marked, watch)
    order = data.TrainOrder(
        plan.train_images, config.seed, comm.rank, comm.size, plan.batch_size, plan.micro_batch, 0, plan.total_steps
    )
    stream: Iterable[engine.Batch] = (
        data.batches(sets.train, order, workers, pin=device.type == "cuda") if sets else same_batch(config, device)
    )
    turns = Turns(connection, marked, watch, job.get("timeline", ""))
    number = "float32" if autocast is None else str(autocast).removeprefix("torch.")
    connection.send({**facts(device), "computes_in": number, "threads": threads, "workers": workers})
    turns.begin()
    log = RunLog(None, tensorboard=False, progress=False)
    engine.train(marked, timed(stream, watch), 0, MarkedCounts(device, watch), log, 10**9, turns)


def _cores(comm: ranks.Comm, place: Any) -> int:
    """Of this rank; independent ranks share the host as those that know each other do."""
    if comm.size > 1 or place is None:
        return cores_per_rank(comm)
    return max(1, len(os.sched_getaffinity(0)) // place.local_size)


def put_marks(job: engine.Job, watch: Watch) -> None:
    """Let the parts of a step tell when they begin."""
    job.model.register_forward_pre_hook(lambda *_: watch.mark("forward"))
    job.optimizer.register_step_pre_hook(lambda *_: watch.mark("optimizer"))
    job.optimizer.register_step_post_hook(lambda *_: watch.mark("rest"))
    scale = job.scaler.scale
    job.scaler.scale = lambda loss: (watch.mark("backward"), scale(loss))[1]  # type: ignore[method-assign]
    if job.reducer is not None:
        finish = job.reducer.finish

        def marked() -> None:
            watch.mark("wait")
            finish()
            watch.mark("rest")

        job.reducer.finish = marked  # type: ignore[method-assign]


def timed(stream: Iterable[engine.Batch], watch: Watch) -> Iterator[engine.Batch]:
    """The same batches; waiting for one is `data`, what is done to it before forward is `input`."""
    batches = iter(stream)
    while True:
        watch.mark("data")
        batch = next(batches)
        watch.mark("input")
        yield batch


def same_batch(config: Config, device: torch.device) -> Iterator[engine.Batch]:
    """One batch of random images, again and again, already where it is needed."""
    n, size = config.micro_batch, config.data.image_size
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=random)
    batch = pixels.to(device), (torch.arange(n) % config.data.classes).to(device)
    while True:
        yield batch


def facts(device: torch.device) -> dict[str, Any]:
    """Who answers, on what, and with which of the variables that matter, our defaults among them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"host": socket.gethostname(), "pid": os.getpid(), "device": device.type, "device_name": name,
            "machine": record.host(), "environment": record.environment()}  # fmt: skip


def main() -> None:
    """Connect, work, leave."""
    die_with_parent()
    job = json.loads(sys.argv[1])
    place = place_of(os.environ)
    address = (os.environ["BENCHMARK_HOST"], int(os.environ["BENCHMARK_PORT"]))
    connection = Client(address, authkey=os.environ["BENCHMARK_KEY"].encode())
    connection.send(place.rank if place else 0)
    if job["task"] == "train":
        task = train
    else:
        from benchmarks.worker_allreduce import reduce_sizes as task
    try:
        task(job, connection)
    except (Finished, EOFError):
        os._exit(0)  # no order to keep any more: nobody waits for a result


if __name__ == "__main__":
    main()
