"""All arithmetic of batches and steps, in one place and before anything is spent."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dist_lars.config import Config
from dist_lars.errors import UserError
from dist_lars.schedule import Rate, scaled_lr


@dataclass(frozen=True)
class Plan:
    """What a run will do: `batch_size = world_size * micro_batch * accumulation`, exactly."""

    name: str
    world_size: int
    batch_size: int  # images per optimizer step, over all ranks
    micro_batch: int  # images per forward pass on one rank = images per BatchNorm statistic
    accumulation: int  # forward and backward passes per step on each rank
    local_batch: int  # images per step on one rank
    train_images: int
    val_images: int
    epochs: int
    steps_per_epoch: int
    dropped_images: int  # left out of each epoch, other ones in each
    total_steps: int
    rate: Rate
    lr_origin: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and the checkpoint; `peak_lr` stands at the top too."""
        return dataclasses.asdict(self) | {"peak_lr": self.rate.peak}


def planned_images(config: Config) -> tuple[int, int]:
    """(training, validation images) that the configuration speaks of, where no folder has been counted."""
    n = config.data.train_images
    held = round(config.data.hold_out * n)
    return (n - held, held) if held else (n, config.data.val_images)


def make_plan(config: Config, world_size: int, train_images: int, val_images: int) -> Plan:
    """Turn a recipe into steps for `world_size` ranks, or raise `UserError` with the nearest valid choices."""
    if world_size < 1:
        raise UserError(f"world size {world_size}: at least one rank is needed")
    per_pass = config.micro_batch * world_size
    if config.batch_size % per_pass:
        raise UserError(_does_not_divide(config.batch_size, config.micro_batch, world_size))
    steps_per_epoch = train_images // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"batch_size {config.batch_size} is larger than the {train_images} training images: not one full step "
            f"per epoch; use more images or {_fewer(train_images // per_pass * per_pass, train_images // world_size)}"
        )
    total = config.epochs * steps_per_epoch
    peak, origin = _peak(config)
    return Plan(
        name=config.name,
        world_size=world_size,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        accumulation=config.batch_size // per_pass,
        local_batch=config.batch_size // world_size,
        train_images=train_images,
        val_images=val_images,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        dropped_images=train_images - steps_per_epoch * config.batch_size,
        total_steps=total,
        rate=_rate(config, peak, steps_per_epoch, total),
        lr_origin=origin,
    )


def _peak(config: Config) -> tuple[float, str]:
    s = config.schedule
    if config.optim.lr is not None:
        return config.optim.lr, "optim.lr, not scaled"
    peak = scaled_lr(s.scaling, s.base_lr, config.batch_size, s.base_batch)
    return peak, f"{s.scaling}: base {s.base_lr:g} per {s.base_batch} images"


def _rate(config: Config, peak: float, steps_per_epoch: int, total: int) -> Rate:
    s = config.schedule
    warmup = round(s.warmup_epochs * steps_per_epoch)
    decay = total - warmup if s.decay_epochs is None else round(s.decay_epochs * steps_per_epoch)
    if peak < max(s.start_lr, s.end_lr):
        raise UserError(
            f"the peak learning rate {peak:g} is below schedule.start_lr {s.start_lr:g} or schedule.end_lr "
            f"{s.end_lr:g}: warm-up must rise and decay must fall; lower them or raise the peak"
        )
    return Rate(
        peak=peak,
        start=s.start_lr,
        end=s.end_lr,
        warmup_steps=warmup,
        decay_steps=decay,
        decay=s.decay,
        power=s.power,
        milestones=tuple(round(m * steps_per_epoch) for m in s.milestones),
        gamma=s.gamma,
    )


def _fewer(batch_size: int, micro_batch: int) -> str:
    if batch_size:
        return f"--batch_size {batch_size}"
    return f"--micro_batch {micro_batch} or less and a smaller --batch_size" if micro_batch else "fewer ranks"


def _does_not_divide(batch: int, micro: int, ranks: int) -> str:
    ways = []
    if batch % micro == 0:
        ways.append(f"{_nearest([d for d in _divisors(batch // micro)], ranks)} ranks")
    if batch % ranks == 0:
        ways.append(f"--micro_batch {_nearest(_divisors(batch // ranks), micro)}")
    multiple = batch // (micro * ranks) * micro * ranks
    ways.append(f"--batch_size {multiple or micro * ranks}" + f" or {multiple + micro * ranks}" * bool(multiple))
    return (
        f"batch_size {batch} does not divide by {ranks} ranks x micro_batch {micro} "
        f"(= {ranks * micro} images per pass); nearest: {'; '.join(ways)}"
    )


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _nearest(values: list[int], wanted: int) -> str:
    below, above = [v for v in values if v < wanted], [v for v in values if v > wanted]
    return " or ".join(str(v) for v in [*below[-1:], *above[:1]])


def describe(plan: Plan) -> str:
    """The plan as the lines that rank 0 prints before anything is spent."""
    r = plan.rate
    shape = {
        "poly": f"polynomial, power {r.power:g}, over {r.decay_steps:,} steps to {r.end:g}",
        "cosine": f"cosine over {r.decay_steps:,} steps to {r.end:g}",
        "step": f"x {r.gamma:g} at steps {', '.join(f'{m:,}' for m in r.milestones)}",
        "constant": "none",
    }[r.decay]
    passes = f"{plan.world_size} ranks x {plan.micro_batch} images x {plan.accumulation} passes"
    return "\n".join(
        [
            f"plan of {plan.name}",
            f"  global batch: {plan.batch_size:,} = {passes}",
            f"  images: {plan.train_images:,} for training, {plan.val_images:,} for validation",
            f"  steps per epoch: {plan.steps_per_epoch:,} ({plan.dropped_images:,} images left out, others each epoch)",
            f"  epochs: {plan.epochs}, {plan.total_steps:,} steps",
            f"  warm-up: {r.warmup_steps:,} steps from {r.start:g}",
            f"  peak learning rate: {r.peak:.6g} ({plan.lr_origin})",
            f"  decay: {shape}",
            f"  images per BatchNorm statistic: {plan.micro_batch}",
        ]
    )
