"""One rank's run: its directory, its checkpoints, its log; what the engine's loop calls at the end of an epoch."""

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_lars import checkpoint, data, engine
from dist_lars import comm as ranks
from dist_lars.config import Config, as_flat, differences, flat_yaml, plain, to_yaml
from dist_lars.errors import UserError
from dist_lars.plan import describe
from dist_lars.runlog import RunLog, read, write_status


class Result(NamedTuple):
    """How a run ended; top-k in percent on the validation images, with the last weights."""

    run_dir: str
    step: int
    loss: float
    top1: float
    top5: float
    best_top1: float
    checkpoint: str


def open_run_dir(config: Config) -> Path:
    """Make the run's directory and write config.yaml there; refuse one that holds another run. For rank 0."""
    run_dir = Path(config.run_dir or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    stored = run_dir / "config.yaml"
    if stored.exists():
        different = differences(flat_yaml(stored.read_text(encoding="utf-8"), str(stored)), as_flat(config))
        if different:
            raise UserError(
                f"run directory {run_dir} holds another run ({_list(different)}); choose another --run_dir, or give "
                f"the options of {stored} to continue it"
            )
        if config.resume.start == "never" and checkpoint.find(run_dir):
            raise UserError(
                f"run directory {run_dir} holds a run, and --resume.from never would overwrite it; choose another"
            )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_aside(stored, to_yaml(config).encode())
    except OSError as e:
        raise UserError(f"cannot write to run directory {run_dir}: {e.strerror}") from e
    return run_dir


def resume_path(config: Config, run_dir: Path) -> str | None:
    """The checkpoint to continue from, as `--resume.from` says; None for a fresh start. For rank 0."""
    if config.resume.start == "never":
        return None
    own = checkpoint.find(run_dir)  # a run that was begun from a checkpoint and then stopped goes on where it stopped
    if own is not None or config.resume.start == "auto":
        return str(own) if own else None
    return config.resume.start


def restore(job: engine.Job, state: dict[str, Any], config: Config, classes: tuple[str, ...], origin: str) -> int:
    """Put a checkpoint into model, optimizer and scaler; the step to continue at.

    Every rank gets its own BatchNorm buffers back at the same number of ranks, their mean at another.
    """
    different = differences(state["config"], as_flat(config))
    if different:
        raise UserError(f"{origin} is of a run with other options ({_list(different)})")
    if tuple(state["classes"]) != classes:
        raise UserError(f"{origin} was trained on other classes than those of the data")
    checkpoint.load_weights(job.model, state["model"], origin)
    own = len(state["buffers"]) == job.comm.size
    if own:
        ranks.unpack(state["buffers"][job.comm.rank], ranks.float_buffers(job.model))
    if job.ema is not None:
        with job.ema.swapped():
            checkpoint.load_weights(job.model, state["ema"], origin)
            if own:
                ranks.unpack(state["ema_buffers"][job.comm.rank], ranks.float_buffers(job.model))
    job.optimizer.load_state_dict(state["optimizer"])
    job.scaler.load_state_dict(state["scaler"])
    return state["step"]


def _list(lines: list[str]) -> str:
    return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")


class Run:
    """The run as rank 0 tells it and all ranks do it."""

    def __init__(self, config: Config, job: engine.Job, sets: data.Sets, run_dir: Path, workers: int) -> None:
        self.config, self.job, self.sets, self.run_dir, self.workers = config, job, sets, run_dir, workers
        self.plan, self.comm = job.plan, job.comm
        mine = data.validation_range(len(sets.val), self.comm.rank, self.comm.size)
        self.val_batches = data.batches(
            sets.val, data.ValOrder(mine, self.plan.micro_batch), workers, pin=job.device.type == "cuda"
        )
        self.log = RunLog(
            run_dir if self.comm.rank == 0 else None, tensorboard=config.log.tensorboard, progress=config.log.progress
        )
        self.scores: dict[str, float] = {}

    def go(self, start: int) -> Result:
        """Train from step `start` to the end; the status file tells how it ended, whatever happens."""
        self._say_start(start)
        order = data.TrainOrder(
            n=self.plan.train_images,
            seed=self.config.seed,
            rank=self.comm.rank,
            size=self.comm.size,
            global_batch=self.plan.batch_size,
            micro_batch=self.plan.micro_batch,
            start=start,
            stop=self.plan.total_steps,
        )
        batches = data.batches(self.sets.train, order, self.workers, pin=self.job.device.type == "cuda")
        try:
            engine.train(self.job, batches, start, self.log, self.config.log.every_steps, self.end_of_epoch)
        except BaseException as e:
            write_status(self.run_dir, "failed", rank=self.comm.rank, reason=f"{type(e).__name__}: {e}")
            raise
        return self._finish()

    def end_of_epoch(self, step: int) -> None:
        """Evaluate and save when it is time."""
        epoch, last = step // self.plan.steps_per_epoch, step == self.plan.total_steps
        best = False
        if last or epoch % self.config.log.eval_epochs == 0:
            best = self._evaluate(step)
        if last or epoch % self.config.resume.save_epochs == 0:
            self._save(step, best)

    def _evaluate(self, step: int) -> bool:
        job, epoch = self.job, step // self.plan.steps_per_epoch
        with engine.evaluated_weights(job):
            self.scores = engine.evaluate(
                job.model, self.val_batches, self.comm, job.device, job.autocast, expected=len(self.sets.val)
            )
        best = self.comm.rank == 0 and self.scores["top1"] > best_top1(self.run_dir, before=step)
        self.log.line("eval", step=step, epoch=epoch, weights="last" if job.ema is None else "averaged", **self.scores)
        s = self.scores
        self.log.say(
            f"epoch {epoch}: top-1 {s['top1']:.2f}%, top-5 {s['top5']:.2f}%, loss {s['loss']:.4f} "
            f"on {s['count']:,} images" + " (averaged weights)" * (job.ema is not None)
        )
        return best

    def _save(self, step: int, best: bool) -> None:
        model, buffers = snapshot(self.job.model, self.comm)
        averages = {}
        if self.job.ema is not None:
            with self.job.ema.swapped():
                averages = dict(zip(("ema", "ema_buffers"), snapshot(self.job.model, self.comm), strict=True))
        if self.comm.rank == 0:
            state = {
                "step": step,
                "model": model,
                "buffers": buffers,
                **averages,
                "optimizer": self.job.optimizer.state_dict(),
                "scaler": self.job.scaler.state_dict(),
                "classes": list(self.sets.classes),
                "config": plain(as_flat(self.config)),
                "plan": plain(self.plan.as_dict()),
                "versions": versions(),
            }
            checkpoint.save(self.run_dir / "checkpoints", state, best=best, keep=self.config.resume.keep)
            self._status("running", step)

    def _finish(self) -> Result:
        if not self.scores:  # a run that had already ended: nothing was trained
            self._evaluate(self.plan.total_steps)
        s, total = self.scores, self.plan.total_steps
        best = self.comm.broadcast(best_top1(self.run_dir) if self.comm.rank == 0 else 0.0, "best")
        last = self.run_dir / "checkpoints" / "latest"
        result = Result(str(self.run_dir), total, s["loss"], s["top1"], s["top5"], best, str(last))
        self.log.line("end", **result._asdict())
        self.log.say(
            f"finished: top-1 {result.top1:.2f}% (best {best:.2f}%), top-5 {result.top5:.2f}%\n"
            f"  checkpoints: {self.run_dir}/checkpoints (latest, best)\n"
            f"  log: {self.run_dir}/log.jsonl, {self.run_dir}/config.yaml\n"
            f"  evaluate: python -m dist_lars.evaluate --checkpoint {self.run_dir} --data.path DIR"
        )
        self.log.close()
        if self.comm.rank == 0:
            self._status("finished", total, top1=result.top1)
        return result

    def _status(self, state: str, step: int, **facts: Any) -> None:
        write_status(self.run_dir, state, step=step, total_steps=self.plan.total_steps, **facts)

    def _say_start(self, start: int) -> None:
        number = "fp32" if self.job.autocast is None else str(self.job.autocast).removeprefix("torch.")
        self.log.say(
            f"{describe(self.plan)}\n"
            f"  computes on: {self.comm.size} x {self.job.device.type} in {number}, {torch.get_num_threads()} threads "
            f"and {self.workers} loader workers per rank\n"
            f"  writes to: {self.run_dir}" + f"\n  continues at step {start:,}" * bool(start)
        )
        facts = {"config": as_flat(self.config), "plan": self.plan.as_dict(), "versions": versions()}
        self.log.line("start", step=start, **plain(facts))
        if self.comm.rank == 0:
            self._status("running", start)


def snapshot(model: nn.Module, comm: ranks.Comm) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(weights with the mean of all ranks' buffers: what evaluates; every rank's own buffers: what continues)."""
    own = comm.gather(ranks.pack(ranks.float_buffers(model)), "buffers of all ranks")
    buffers = {name for name, _ in model.named_buffers()}
    with ranks.averaged_buffers(model, comm):  # outside, the buffers are a rank's own again: keep copies of the mean
        return {k: v.clone() if k in buffers else v for k, v in model.state_dict().items()}, own


def best_top1(run_dir: Path, before: int | None = None) -> float:
    """The highest top-1 in the log, of evaluations before a step if one is given; -1 without any."""
    lines = read(run_dir, "eval")
    return max((line["top1"] for line in lines if before is None or line["step"] < before), default=-1.0)


def versions() -> dict[str, str]:
    """What computed this run."""
    found = {"python": platform.python_version()}
    for name in ("dist_lars", "torch", "torchvision", "horovod", "numpy", "pillow", "pillow-simd"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
