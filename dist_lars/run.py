"""One rank's run: its log, its checkpoints, and what happens between two steps."""

import socket
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_lars import checkpoint, data, engine, inputs
from dist_lars.config import Config, as_flat, plain
from dist_lars.errors import UserError
from dist_lars.guards import Diverged
from dist_lars.metrics import Counts
from dist_lars.plan import describe
from dist_lars.runlog import RunLog, read, warn, write_status
from dist_lars.state import Progress, capture, restore, versions
from dist_lars.supervisor import RollBack, Stopped, Supervisor
from dist_lars.watchdog import Watchdog


class Result(NamedTuple):
    """How a run ended; top-k in percent on the validation images, with the last weights."""

    run_dir: str
    step: int
    loss: float
    top1: float
    top5: float
    best_top1: float
    checkpoint: str


class Run:
    """The run as rank 0 tells it and all ranks do it: the engine's `Hooks`."""

    def __init__(self, config: Config, job: engine.Job, sets: data.Sets, run_dir: Path, workers: int) -> None:
        self.config, self.job, self.sets, self.run_dir, self.workers = config, job, sets, run_dir, workers
        self.plan, self.comm = job.plan, job.comm
        self.patient = config.resume.on_save_error == "continue"
        mine = data.validation_range(len(sets.val), self.comm.rank, self.comm.size)
        self.val_batches = data.batches(
            sets.val, data.ValOrder(mine, self.plan.micro_batch), workers, pin=job.device.type == "cuda"
        )
        self.progress, self.counts = Progress(), Counts(job.device)
        self.log = RunLog(
            run_dir if self.comm.rank == 0 else None, tensorboard=config.log.tensorboard,
            progress=config.log.progress, patient=self.patient,
        )  # fmt: skip
        self.log.advice = inputs.advice(config, sets, workers)
        self.images = inputs.images_of(config, sets)
        self.train_batches: data.Batches | data.Remembered | None = None
        self.skipped: dict[str, str] = {}  # files that were no images, and why; of all ranks
        stacks = run_dir / f"stacks-rank{self.comm.rank}.txt"
        self.watchdog = Watchdog(self.comm.rank, stacks, config.guard.hang_seconds, self._failed)
        self.supervisor = Supervisor(config, job, run_dir, len(sets.classes))
        self.scores: dict[str, float] = {}
        self.started = ""  # when rank 0 said so: what the statuses of this job have in common

    @property
    def lr_factor(self) -> float:
        """Of the scheduled learning rate."""
        return self.progress.lr_factor

    def restore(self, path: str) -> None:
        """Continue from a checkpoint."""
        state = checkpoint.load(path)
        self.progress = restore(self.job, state, self.config, self.sets.classes, self.counts, path)

    def go(self) -> Result:
        """Train to the end; the status file tells how it ended, whatever happens."""
        self._say_start()
        self.watchdog.start()
        try:
            while not self._train():
                continue  # rolled back: once more, from the last checkpoint
            return self._finish()
        except Stopped as e:
            self._end_log("stop", step=e.step, reason=e.reason)
            self._status("stopped", reason=e.reason)
            raise
        except BaseException as e:
            self._failed(f"{type(e).__name__}: {e}")
            raise
        finally:
            self.watchdog.stop()

    def _train(self) -> bool:
        """Train until the end (True), or until a roll-back (False)."""
        order = data.TrainOrder(
            n=self.plan.train_images,
            seed=self.config.seed,
            rank=self.comm.rank,
            size=self.comm.size,
            global_batch=self.plan.batch_size,
            micro_batch=self.plan.micro_batch,
            start=self.progress.step,
            stop=self.plan.total_steps,
        )
        self.train_batches = batches = data.batches(
            self.sets.train, order, self.workers, pin=self.job.device.type == "cuda"
        )
        every = self.config.log.every_steps
        try:
            engine.train(self.job, batches, self.progress.step, self.counts, self.log, every, self)
        except RollBack as e:
            self._roll_back(str(e))
            return False
        return True

    # --- what the engine tells ----------------------------------------------------------------------------------------

    def after_step(self, step: int, norm: float) -> None:
        """Check the numbers, evaluate and save when it is time, stop when the ranks have agreed to."""
        self.progress.step = step
        stop, save = self.supervisor.agreed()
        self._check(step, norm)
        every = self.config.resume.save_steps
        save = save or stop or bool(every and step % every == 0)
        if step % self.plan.steps_per_epoch == 0:
            self._end_of_epoch(step, save)
        elif save:
            self._save(best=False)
        if stop and step < self.plan.total_steps:
            raise self.supervisor.stopped(step)
        self.supervisor.note()
        self.watchdog.beat(f"in step {step + 1}")

    def loss(self, step: int, loss: float) -> None:
        """Stop a run whose loss has run away."""
        self.supervisor.loss_bound.check(loss, step)

    def _check(self, step: int, norm: float) -> None:
        try:
            skipped = self.supervisor.broken(norm, self.progress)
        except Diverged as e:
            raise Diverged(f"{e}; {self._save_failed()}") from e
        if skipped:
            self.log.say(f"{skipped}: skipped ({self.progress.skipped} so far)")
            self.log.line("skip", step=step, reason=skipped)
        if step % self.config.log.trust_steps == 0 and self.comm.rank == 0:
            self._log_trust_ratios(step)
        if step % self.config.guard.check_steps == 0:
            self.supervisor.compare_replicas(step)

    def _roll_back(self, reason: str) -> None:
        path = self.comm.broadcast(str(checkpoint.newest_good(self.run_dir)[0] or ""), "roll back")
        if not path:
            raise Diverged(f"{reason}, and there is no checkpoint to roll back to")
        factor, skipped, rollbacks = self.progress.lr_factor / 2, self.progress.skipped, self.progress.rollbacks + 1
        self.restore(path)
        self.progress = Progress(self.progress.step, factor, skipped, rollbacks)
        self.supervisor.note()
        self.log.say(f"{reason}: back to step {self.progress.step:,} with {factor:g} of the learning rate")
        self.log.line("rollback", step=self.progress.step, reason=reason, lr_factor=factor)

    def _end_of_epoch(self, step: int, save: bool) -> None:
        """Evaluate when it is time; save then, or when something else asks for it."""
        epoch, last = step // self.plan.steps_per_epoch, step == self.plan.total_steps
        evaluate = last or epoch % self.config.log.eval_epochs == 0
        save = save or last or epoch % self.config.resume.save_epochs == 0
        best = evaluate and self._evaluate(step, save)
        if save:
            self._save(best)
        self._say_skipped(step)

    def _say_skipped(self, step: int) -> None:
        """Put the files that were no images, of all ranks, into the log, each once."""
        if self.config.data.on_error != "skip":
            return
        own = {**(self.train_batches.skipped if self.train_batches else {}), **self.val_batches.skipped}
        found = inputs.check_skipped(self.comm.gather(own, "skipped files"), self.config.data.max_skipped)
        for name, why in found.items():
            if name not in self.skipped:
                self.log.say(f"skipped {name}: {why}")
                self.log.line("skipped", step=step, file=name, reason=why)
        self.skipped |= found

    # --- evaluating and saving ----------------------------------------------------------------------------------------

    def _evaluate(self, step: int, saved: bool) -> bool:
        """Evaluate and tell; whether these weights, which are then `saved` or not, are the best so far (rank 0)."""
        job, epoch, began = self.job, step // self.plan.steps_per_epoch, time.monotonic()
        with engine.evaluated_weights(job):
            batches = self._watched(self.val_batches, "evaluating")
            self.scores = engine.evaluate(
                job.model, batches, self.comm, job.device, job.autocast, expected=len(self.sets.val),
                left_out=lambda: len(self.val_batches.skipped),
            )  # fmt: skip
        self.supervisor.evaluated(time.monotonic() - began)
        best = self.comm.rank == 0 and self.scores["top1"] > best_top1(self.run_dir, before=step)
        weights = "last" if job.ema is None else "averaged"
        self.log.line("eval", step=step, epoch=epoch, weights=weights, saved=saved, **self.scores)
        s = self.scores
        self.log.say(
            f"epoch {epoch}: top-1 {s['top1']:.2f}%, top-5 {s['top5']:.2f}%, loss {s['loss']:.4f} "
            f"on {s['count']:,} images" + " (averaged weights)" * (job.ema is not None)
        )
        return best

    def _watched(self, batches: Iterable[engine.Batch], what: str) -> Iterator[engine.Batch]:
        for batch in batches:
            self.watchdog.beat(what)
            yield batch

    def _save(self, best: bool) -> None:
        self.watchdog.beat("saving")
        began = time.monotonic()
        state = capture(self.job, self.config, self.sets.classes, self.progress, self.counts)
        if self.comm.rank == 0:
            try:
                checkpoint.save(self.run_dir / "checkpoints", state, best=best, keep=self.config.resume.keep)
                self._status("running")
            except OSError as e:
                self._save_error(e)
        self.supervisor.saved(time.monotonic() - began)

    def _save_error(self, error: OSError) -> None:
        text = f"checkpoint of step {self.progress.step} could not be written: {error.strerror}; the one before is good"
        if not self.patient or self.progress.step == self.plan.total_steps:  # the last has no later one to make up
            raise UserError(text) from error
        warn(f"{text}; training goes on")
        self.log.line("save_error", step=self.progress.step, reason=text)

    def _save_failed(self) -> str:
        """Keep the state of a failed run where no resume looks for it; where."""
        state = capture(self.job, self.config, self.sets.classes, self.progress, self.counts)
        path = self.run_dir / "failed" / f"step-{self.progress.step:09d}.pt"
        try:
            if self.comm.rank == 0:
                path.parent.mkdir(exist_ok=True)
                checkpoint.write_aside(path, checkpoint.to_bytes(state))
        except OSError as e:
            return f"the state could not be saved for inspection: {e.strerror}"
        return f"the state is saved for inspection in {path}"

    # --- telling ------------------------------------------------------------------------------------------------------

    def _finish(self) -> Result:
        if not self.scores:  # a run that had already ended: nothing was trained
            self._evaluate(self.plan.total_steps, saved=True)
        self.supervisor.agreed()
        s, total = self.scores, self.plan.total_steps
        best = self.comm.broadcast(best_top1(self.run_dir) if self.comm.rank == 0 else 0.0, "best")
        last = self.run_dir / "checkpoints" / "latest"
        result = Result(str(self.run_dir), total, s["loss"], s["top1"], s["top5"], best, str(last))
        self.log.say(
            f"finished: top-1 {result.top1:.2f}% (best {best:.2f}%), top-5 {result.top5:.2f}%\n"
            f"  checkpoints: {self.run_dir}/checkpoints (latest, best)\n"
            f"  log: {self.run_dir}/log.jsonl, {self.run_dir}/config.yaml\n"
            f"  evaluate: python -m dist_lars.evaluate --checkpoint {self.run_dir} --data.path {self.images}"
        )
        self._end_log("end", **result._asdict())
        self._status("finished", top1=result.top1)
        return result

    def _log_trust_ratios(self, step: int) -> None:
        """One line of log.jsonl: the ratio of every tensor, and the quantiles over them (min, quartiles, max)."""
        ratios: dict[str, float] = getattr(self.job.optimizer, "trust_ratios", dict)()
        if ratios:
            quantiles = np.percentile(list(ratios.values()), [0, 25, 50, 75, 100]).tolist()
            self.log.line("trust", step=step, quantiles=quantiles, ratios=ratios)

    def _end_log(self, kind: str, **facts: Any) -> None:
        self.log.line(kind, **facts)
        self.log.close()

    def _status(self, state: str, **facts: Any) -> None:
        if self.comm.rank == 0:
            step, total = self.progress.step, self.plan.total_steps
            self._write_status(state, self.patient, step=step, total_steps=total, **facts)

    def _failed(self, reason: str) -> None:
        """Any rank may be the one that fails, and nobody can be asked any more."""
        self._write_status("failed", True, step=self.progress.step, rank=self.comm.rank, reason=reason)

    def _write_status(self, state: str, patient: bool, **facts: Any) -> None:
        try:
            write_status(self.run_dir, state, self.started, **facts)
        except OSError as e:
            if not patient:
                raise
            warn(f"status.json could not be written ({state}): {e.strerror}")

    def _say_start(self) -> None:
        number = "fp32" if self.job.autocast is None else str(self.job.autocast).removeprefix("torch.")
        start = self.progress.step
        self.log.say(
            f"{describe(self.plan)}\n"
            f"  computes on: {self.comm.size} x {self.job.device.type} in {number}, {torch.get_num_threads()} threads "
            f"and {self.workers} loader workers per rank\n"
            f"  writes to: {self.run_dir}" + f"\n  continues at step {start:,}" * bool(start)
        )
        self.started = self.comm.broadcast(datetime.now(UTC).isoformat(), "started")
        hosts = self.log.hosts = self.comm.gather(socket.gethostname(), "hosts")
        facts = {
            "classes": len(self.sets.classes),
            "config": as_flat(self.config),
            "plan": self.plan.as_dict(),
            "versions": versions(),
        }
        self.log.line("start", step=start, hosts=hosts, **plain(facts))
        self._status("running")


def best_top1(run_dir: Path, before: int | None = None) -> float:
    """The highest top-1 in the log of weights that were saved, before a step if one is given; -1 without any."""
    scores: dict[int, float] = {}
    for line in read(run_dir):
        if line["kind"] == "eval" and line.get("saved", True):
            scores[line["step"]] = line["top1"]
        elif line["kind"] == "save_error":
            scores.pop(line["step"], None)
    return max((top1 for step, top1 in scores.items() if before is None or step < before), default=-1.0)
