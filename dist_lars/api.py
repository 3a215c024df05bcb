"""The same composition for Python users as for the command line: `train(config)`, `evaluate(checkpoint, data)`.

from dist_lars import api
from dist_lars.cli import load_config
result = api.train(load_config("quickstart", overrides={"epochs": 3}))
print(api.evaluate(result.run_dir, "path/to/images"))
"""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_lars import checkpoint, data, engine, inputs, models, optim
from dist_lars import comm as ranks
from dist_lars.comm import Comm
from dist_lars.config import Config, as_flat, from_flat
from dist_lars.ema import Ema
from dist_lars.errors import UserError
from dist_lars.plan import Plan, make_plan
from dist_lars.resources import FORMATS, cores_per_rank, on_cpu, pick_autocast, pick_device, use_cores
from dist_lars.run import Result, Run
from dist_lars.rundir import open_run_dir, resume_path, write_config


class Scores(NamedTuple):
    """Means over the images; top-k in percent."""

    loss: float
    top1: float
    top5: float


def train(config: Config, comm: Comm | None = None) -> Result:
    """Train as the configuration says, on the ranks that the launcher started; every rank gets the same `Result`.

    Continues the run in `config.run_dir` if there is one. Raises `UserError` for wrong values, data or launches.
    """
    comm = comm or start_ranks(config)
    ranks.assert_same(comm, "\n".join(_lines(config)), "the configuration")  # before the ranks go ways that it tells
    with ExitStack() as held:
        run = _prepare(config, comm, held)
        result = run.go()
        inputs.leave(config, comm, run.sets)
    return result


def _prepare(config: Config, comm: Comm, held: ExitStack) -> Run:
    """All that comes before the first step; `held`: rank 0's lock of the run's directory, and the signals."""
    device = pick_device(config.device, comm.local_rank)
    autocast = pick_autocast(config.precision, device)
    cores = cores_per_rank(comm)
    workers, threads = use_cores(cores, device, config.data.workers)
    torch.backends.cudnn.benchmark = not config.comm.deterministic  # all batches have one shape: trying out pays
    torch.manual_seed(config.seed)
    sets = inputs.open_sets(config, comm, cores)
    plan = ranks.on_every_rank(comm, lambda: make_plan(config, comm.size, len(sets.train), len(sets.val)), "plan")
    ranks.assert_same(comm, f"computes in {autocast}\n{plan}", "the plan")

    def own_run_dir() -> str:
        run_dir, lock = open_run_dir(config)
        held.enter_context(lock)
        return str(run_dir)

    run_dir = Path(ranks.on_first_rank(comm, own_run_dir, "run_dir"))
    job = ranks.on_every_rank(comm, lambda: make_job(config, comm, plan, len(sets.classes), device, autocast), "job")
    run = Run(config, job, sets, run_dir, workers)
    held.push(run.supervisor.leave)
    _resume(run, config, run_dir)
    ranks.on_first_rank(comm, lambda: write_config(config, run_dir), "config.yaml")
    ranks.sync_parameters(job.model, comm)
    run.supervisor.compare_replicas(run.progress.step)
    return run


def start_ranks(config: Config) -> Comm:
    """Join the other ranks, with defaults for the device that this configuration will use."""
    c = config.comm
    backend = ranks.Backend(c.backend, c.deterministic, c.cycle_ms, c.fusion_mb, c.cache, c.hierarchical)
    return ranks.start(cpu=on_cpu(config.device), backend=backend)


def _lines(config: Config) -> list[str]:
    return [f"{k}: {v}" for k, v in as_flat(config).items()]


def _resume(run: Run, config: Config, run_dir: Path) -> None:
    origin, damaged = ranks.on_first_rank(run.comm, lambda: resume_path(config, run_dir), "resume from")
    for path in damaged:
        run.log.say(f"warning: checkpoint {path} is damaged and passed over")

    def read() -> None:
        if origin is not None:
            run.restore(origin)
        elif config.model.weights:
            weights = checkpoint.read_weights(config.model.weights)
            checkpoint.load_weights(run.job.model, weights, config.model.weights)

    ranks.on_every_rank(run.comm, read, "read weights")


def make_job(
    config: Config, comm: Comm, plan: Plan, classes: int, device: torch.device, autocast: torch.dtype | None
) -> engine.Job:
    """Model, optimizer and gradient averaging of one rank, freshly initialised from torch's current seed."""
    model = make_model(config, classes)
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    return engine.Job(
        model=model,
        optimizer=make_optimizer(config, model, plan.rate.peak),
        comm=comm,
        reducer=comm.reducer(model.parameters(), config.comm.bucket_mb, FORMATS[config.comm.wire]),
        plan=plan,
        device=device,
        autocast=autocast,
        scaler=torch.amp.GradScaler(device.type, enabled=autocast == torch.float16),
        seed=config.seed,
        clip_norm=config.optim.clip_norm,
        label_smoothing=config.optim.label_smoothing,
        ema=Ema([*model.parameters(), *ranks.float_buffers(model)], decay)
        if (decay := config.optim.ema_decay)
        else None,
    )


def make_model(config: Config, classes: int) -> nn.Module:
    """The configured network, initialised from torch's current random state."""
    options = {k: v for k, v in dataclasses.asdict(config.model).items() if k in models.OPTIONS}
    return models.build(config.model.name, num_classes=classes, **options)


def make_optimizer(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The configured optimizer over the configured groups; what is left open follows the LARS law."""
    o = config.optim
    law = optim.LAWS[o.law]
    groups = optim.param_groups(
        model,
        weight_decay=o.weight_decay,
        exclude_from_adaptation=o.exclude_from_adaptation or law.exclude_from_adaptation,
        exclude_from_decay=o.exclude_from_decay or law.exclude_from_decay,
        bias_lr_scale=o.bias_lr_scale,
    )
    return optim.build(
        o.name,
        groups,
        lr=lr,
        momentum=o.momentum,
        weight_decay=o.weight_decay,
        law=o.law,
        trust_coefficient=o.trust_coefficient,
        min_norm=o.min_norm,
    )


# --- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate(model: nn.Module | str | Path, path: str, **options: Any) -> Scores:
    """(loss, top1, top5) of a model or checkpoint on the images below `path`; `options` are those of `score`."""
    scores = score(model, path, **options)
    return Scores(*(scores[name] for name in Scores._fields))


def score(
    model: nn.Module | str | Path,
    path: str,
    *,
    image_size: int = 224,
    resize: int = 256,
    batch: int = 64,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    comm: Comm | None = None,
) -> dict[str, float]:
    """loss, top1, top5 (percent) and count of a model or a checkpoint (see `checkpoint.load`) on a folder of images.

    `path` holds val/CLASS/image.jpg, test/CLASS/image.jpg or CLASS/image.jpg. A checkpoint brings its own image size
    and class names, and refuses a folder with other classes. A module is moved to the device, and stays in the mode,
    training or not, that it had. Raises `UserError` for what cannot be read.
    """
    comm = comm or ranks.LocalComm()
    ranks.on_every_rank(comm, lambda: _check_numbers(batch, workers), "numbers")
    place = pick_device(device, comm.local_rank)
    cores, threads = use_cores(cores_per_rank(comm), place, workers)
    index = inputs.open_val(path, comm)
    if isinstance(model, nn.Module):
        net = model
    else:
        net, image_size, resize = ranks.on_every_rank(comm, lambda: _from_checkpoint(model, index), "checkpoint")
    net = net.to(device=place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mine = data.ValOrder(data.validation_range(len(index), comm.rank, comm.size), batch)
    images = data.val_images(index, image_size, resize)
    batches = data.batches(images, mine, cores, pin=place.type == "cuda")
    return engine.evaluate(net, batches, comm, place, pick_autocast(precision, place), len(index))


def _check_numbers(batch: int, workers: int | None) -> None:
    if batch < 1 or (workers or 0) < 0:
        raise UserError(f"batch is {batch} and workers {workers}, but they must be at least 1 and zero or more")


def _from_checkpoint(path: str | Path, index: data.Index) -> tuple[nn.Module, int, int]:
    state = checkpoint.load(path)
    config = from_flat(state["config"])
    if tuple(state["classes"]) != index.classes:
        raise UserError(
            f"{path} knows {len(state['classes'])} classes ({', '.join(state['classes'][:3])} ...), {index.root} has "
            f"{len(index.classes)} ({', '.join(index.classes[:3])} ...): labels would mean different things"
        )
    model = make_model(config, len(index.classes))
    checkpoint.load_weights(model, checkpoint.evaluated(state), str(path))
    return model, config.data.image_size, config.data.resize
