"""What a run is between two steps: into a checkpoint and back, bit for bit."""

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from dist_lars import checkpoint
from dist_lars import comm as ranks
from dist_lars.config import Config, as_flat, plain
from dist_lars.continuation import differences
from dist_lars.engine import Job
from dist_lars.errors import UserError
from dist_lars.metrics import Counts
from dist_lars.resources import name_of_format
from dist_lars.rundir import keys, some

GATHERED = 1 << 23  # numbers that a rank receives at a time: 32 MB in float32


@dataclass
class Progress:
    """The engine's own counters."""

    step: int = 0
    lr_factor: float = 1.0  # below 1 after a roll-back
    skipped: int = 0  # steps whose gradient was not finite
    rollbacks: int = 0


def capture(job: Job, config: Config, classes: tuple[str, ...], progress: Progress, counts: Counts) -> dict[str, Any]:
    """The whole state, complete on rank 0; a collective, and it changes nothing of what is computed."""
    model, buffers = _snapshot(job.model, job.comm)
    state = {
        "step": progress.step,
        "model": model,
        "buffers": buffers,
        "optimizer": job.optimizer.state_dict(),
        "scaler": job.scaler.state_dict(),
        "counters": {"lr_factor": progress.lr_factor, "skipped": progress.skipped, "rollbacks": progress.rollbacks},
        "partial": job.comm.gather(counts.sums.tolist(), "partial sums"),
        "classes": list(classes),
        "config": plain(as_flat(config)),
        "plan": plain(job.plan.as_dict()),
        "precision": name_of_format(job.autocast),
        "versions": versions(),
    }
    if job.ema is not None:
        with job.ema.swapped():
            state["ema"], state["ema_buffers"] = _snapshot(job.model, job.comm)
    return state


def _snapshot(model: nn.Module, comm: ranks.Comm) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(weights with the mean of all ranks' buffers: what evaluates; every rank's own buffers: what continues)."""
    own = _on_first_rank(ranks.float_buffers(model), comm)
    buffers = {name for name, _ in model.named_buffers()}
    with ranks.averaged_buffers(model, comm):  # outside, the buffers are a rank's own again: keep copies of the mean
        return {k: v.clone() if k in buffers else v for k, v in model.state_dict().items()}, own


def _on_first_rank(buffers: list[torch.Tensor], comm: ranks.Comm) -> list[torch.Tensor]:
    """Every rank's buffers as one vector each, on rank 0; [] on the others, for those of 1,024 ranks are 220 MB."""
    # From the host's memory: a GPU's tensor would arrive on that GPU, where every other rank would open a context.
    flat = torch.cat([b.detach().reshape(-1) for b in buffers] or [torch.zeros(0)]).cpu()
    found = []
    for piece in flat.split(max(1, GATHERED // comm.size)):
        said = comm.gather(piece.clone(), "buffers of all ranks")  # a view would be sent with all that it is a view of
        if comm.rank == 0:
            found.append(said)
    return [torch.cat(pieces) for pieces in zip(*found, strict=True)]


def restore(
    job: Job, state: dict[str, Any], config: Config, classes: tuple[str, ...], counts: Counts, origin: str
) -> Progress:
    """Put a checkpoint into model, optimizer, scaler and counts.

    Every rank gets its own BatchNorm buffers and partial sums back at the same number of ranks; at another, the mean
    of the buffers, and rank 0 the sum of the sums.
    """
    different = differences(*_found(job, state, config))
    if different:
        raise UserError(
            f"{origin} is of a run with other options or images ({some(different)}); give the same ones, "
            f"or allow the difference: --resume.allow '[{keys(different)}]'"
        )
    if tuple(state["classes"]) != classes:
        raise UserError(f"{origin} was trained on other classes than those of the data")
    if unfit := _unfit(job.optimizer, state, config):
        raise UserError(
            f"{origin} cannot be continued with {unfit}; give the options that it was trained with, or begin a new run "
            f"from its weights: --model.weights {origin} and another --run_dir"
        )
    same_size, rank = len(state["buffers"]) == job.comm.size, job.comm.rank
    _load(job.model, state["model"], state["buffers"][rank] if same_size else None, origin)
    if job.ema is not None:
        with job.ema.swapped():
            # A run that kept no average until now begins with its weights.
            average, buffers = state.get("ema", state["model"]), state.get("ema_buffers", state["buffers"])
            _load(job.model, average, buffers[rank] if same_size else None, origin)
    _load_optimizer(job.optimizer, state["optimizer"])
    if state["scaler"]:  # empty of a run without loss scaling
        job.scaler.load_state_dict(state["scaler"])
    sums = torch.tensor(state["partial"], dtype=torch.float64)
    counts.sums.copy_(sums[rank] if same_size else sums.sum(0) * (rank == 0))
    return Progress(step=state["step"], **state["counters"])


def _found(job: Job, state: dict[str, Any], config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the saved run and of this one; images as they were counted, the number format as it was chosen."""
    old, new = dict(state["config"]), as_flat(config)
    old["data.train_images"], new["data.train_images"] = state["plan"]["train_images"], job.plan.train_images
    if "precision" in state:  # older checkpoints know what was asked for, only
        old["precision"], new["precision"] = state["precision"], name_of_format(job.autocast)
    return old, new


def _unfit(optimizer: torch.optim.Optimizer, state: dict[str, Any], config: Config) -> str | None:
    """Which difference, even if it is allowed, leaves the saved momentum without a meaning."""
    options, saved = state["config"], state["optimizer"]["param_groups"]
    if options["optim.name"] != config.optim.name:
        return f"optim.name {options['optim.name']} -> {config.optim.name}"
    if [group.get("param_names") for group in saved] != [group.get("param_names") for group in optimizer.param_groups]:
        return "other groups of parameters (optim.exclude_from_*, optim.bias_lr_scale)"
    placements = [{group.get("lr_placement") for group in groups} for groups in (saved, optimizer.param_groups)]
    if placements[0] != placements[1]:
        return f"optim.law {options['optim.law']} -> {config.optim.law}: one has the learning rate inside the momentum"
    return None


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The saved state under this run's own settings, which load_state_dict would replace; only the rate is state."""
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _load(model: nn.Module, weights: dict[str, torch.Tensor], own: torch.Tensor | None, origin: str) -> None:
    checkpoint.load_weights(model, weights, origin)
    if own is not None:
        ranks.unpack(own, ranks.float_buffers(model))


def versions() -> dict[str, str]:
    """What computed this run."""
    found = {"python": platform.python_version()}
    for name in ("dist_lars", "torch", "torchvision", "horovod", "numpy", "pillow", "pillow-simd"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
