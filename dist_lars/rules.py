"""Which values the options may have."""

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dist_lars.errors import UserError

if TYPE_CHECKING:
    from dist_lars.config import Config


def check(c: "Config") -> None:
    """Raise `UserError` for the first value that no run can have, with the rule and a value that works."""
    at_least_one = {
        "batch_size": c.batch_size, "micro_batch": c.micro_batch, "epochs": c.epochs,
        "data.image_size": c.data.image_size, "data.resize": c.data.resize, "data.classes": c.data.classes,
        "data.train_images": c.data.train_images, "data.val_images": c.data.val_images,
        "schedule.base_batch": c.schedule.base_batch, "resume.save_epochs": c.resume.save_epochs,
        "resume.keep": c.resume.keep, "resume.save_steps": c.resume.save_steps or 1,
        "guard.max_loss_steps": c.guard.max_loss_steps, "guard.check_steps": c.guard.check_steps,
        "log.every_steps": c.log.every_steps, "log.trust_steps": c.log.trust_steps,
        "log.eval_epochs": c.log.eval_epochs,
    }  # fmt: skip
    not_negative = {
        "seed": c.seed, "data.workers": c.data.workers or 0, "data.max_skipped": c.data.max_skipped,
        "optim.weight_decay": c.optim.weight_decay, "optim.min_norm": c.optim.min_norm or 0.0,
        "schedule.warmup_epochs": c.schedule.warmup_epochs, "schedule.start_lr": c.schedule.start_lr,
        "schedule.end_lr": c.schedule.end_lr, "guard.max_skips": c.guard.max_skips,
        "comm.fusion_mb": c.comm.fusion_mb or 0, "comm.cache": c.comm.cache or 0,
    }  # fmt: skip
    positive = {
        "schedule.base_lr": c.schedule.base_lr, "comm.bucket_mb": c.comm.bucket_mb,
        "comm.cycle_ms": 1.0 if c.comm.cycle_ms is None else c.comm.cycle_ms,
        "schedule.power": c.schedule.power, "optim.trust_coefficient": c.optim.trust_coefficient,
        "optim.lr": 1.0 if c.optim.lr is None else c.optim.lr, "optim.bias_lr_scale": c.optim.bias_lr_scale,
        "model.fc_std": 1.0 if c.model.fc_std is None else c.model.fc_std,
        "optim.clip_norm": 1.0 if c.optim.clip_norm is None else c.optim.clip_norm,
        "guard.max_loss": 1.0 if c.guard.max_loss is None else c.guard.max_loss,
        "guard.hang_seconds": 1.0 if c.guard.hang_seconds is None else c.guard.hang_seconds,
        "resume.save_minutes": 1.0 if c.resume.save_minutes is None else c.resume.save_minutes,
        "schedule.decay_epochs": 1.0 if c.schedule.decay_epochs is None else c.schedule.decay_epochs,
    }  # fmt: skip
    _require(at_least_one, lambda v: v >= 1, "must be at least 1")
    _require(not_negative, lambda v: 0 <= v < math.inf, "must be zero or more, and finite")
    _require(positive, lambda v: 0 < v < math.inf, "must be above zero, and finite")
    shares = {
        "data.hold_out": c.data.hold_out,
        "optim.momentum": c.optim.momentum, "optim.label_smoothing": c.optim.label_smoothing,
        "optim.ema_decay": c.optim.ema_decay, "model.dropout": c.model.dropout,
    }  # fmt: skip
    _require(shares, lambda v: 0 <= v < 1, "must be in [0, 1)")
    _require({"data.min_scale": c.data.min_scale}, lambda v: 0 < v <= 1, "is a share of the area: 0 < value <= 1")
    _require({"seed": c.seed}, lambda v: v < 2**63, "must be below 2^63")
    _require({"schedule.gamma": c.schedule.gamma}, lambda v: 0 < v <= 1, "is the factor of a drop: 0 < value <= 1")
    _require(
        {"schedule.milestones": min(c.schedule.milestones, default=0)}, lambda v: v >= 0, "must be epochs from 0 on"
    )
    if c.max_time is not None:
        seconds_of(c.max_time)
    _fit_together(c)


def seconds_of(text: str) -> float:
    """A duration as SLURM writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; in seconds."""
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})", text.strip())
    if not match:
        raise UserError(f"max_time is {text!r}, but it must be a duration such as 01:55:00, 1-12:00:00 or 90 (minutes)")
    parts = [int(p) for p in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return 86400 * int(match["days"]) + 3600 * hours + 60 * minutes + seconds
    units = {1: [60], 2: [60, 1], 3: [3600, 60, 1]}[len(parts)]
    return float(sum(n * u for n, u in zip(parts, units, strict=True)))


def _fit_together(c: "Config") -> None:
    if c.data.hold_out and c.data.kind == "synthetic":
        raise UserError("data.hold_out takes images from a folder, and random images have none: use --data.hold_out 0")
    if c.data.resize < c.data.image_size:
        raise UserError(
            f"data.resize {c.data.resize} is smaller than data.image_size {c.data.image_size}: validation "
            f"cannot crop what is not there; use --data.resize {round(c.data.image_size * 8 / 7)}"
        )
    if c.schedule.warmup_epochs > c.epochs:
        raise UserError(
            f"schedule.warmup_epochs {c.schedule.warmup_epochs:g} is longer than epochs {c.epochs}: the peak learning "
            f"rate would never be reached; use --schedule.warmup_epochs {c.epochs / 10:g}"
        )
    _only_horovods(c)


def _only_horovods(c: "Config") -> None:
    knobs = {"cycle_ms": c.comm.cycle_ms, "fusion_mb": c.comm.fusion_mb, "cache": c.comm.cache,
             "hierarchical": c.comm.hierarchical}  # fmt: skip
    idle = [f"comm.{name}" for name, value in knobs.items() if value is not None]
    if c.comm.backend == "torch" and idle:
        raise UserError(f"{', '.join(idle)} is a knob of Horovod's: leave it out with comm.backend torch")


def _require(values: Mapping[str, float], rule: Callable[[float], bool], text: str) -> None:
    for name, value in values.items():
        if not rule(value):
            raise UserError(f"{name} is {value}, but it {text}")
