"""Between two steps: do all ranks want to go on, are the numbers sound, are the replicas still equal?"""

import math
import os
import threading
import time
from pathlib import Path

from dist_lars import comm as ranks
from dist_lars.config import Config
from dist_lars.engine import Job
from dist_lars.guards import Diverged, LossBound, default_bound, first_difference, not_finite, tensor_sums
from dist_lars.state import Progress
from dist_lars.stopping import StopNotes, deadline

STARTED = time.time()  # of this process: --max_time counts from here


class Stopped(Exception):
    """The run was asked to stop, and saved; `step` steps are done. Every rank raises it alike."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"stopped after step {step}: {reason}")
        self.step, self.reason = step, reason


class RollBack(Exception):
    """A gradient was not finite, and the last checkpoint is to be continued more carefully."""


class Supervisor:
    """One rank's part in what all ranks decide together."""

    def __init__(self, config: Config, job: Job, run_dir: Path, classes: int) -> None:
        self.config, self.job, self.comm = config, job, job.comm
        first = job.comm.rank == 0
        self.stop_file = run_dir / "STOP"
        self.notes = StopNotes(
            self.stop_file if first else None, deadline(config.max_time, STARTED, os.environ) if first else None
        )
        bound = config.guard.max_loss or default_bound(classes)
        self.loss_bound = LossBound(bound, config.guard.max_loss_steps)
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.noted_at, self.step_seconds, self.evaluate_seconds = time.monotonic(), 0.0, 0.0
        self.pending = self.comm.sum_later([0, 0])
        # Last, for whoever made it gives them back. Python runs signal handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self.notes.listen()

    def leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the signals back, unless the run was stopped: launchers send several, and its exit code shall tell."""
        if kind is not Stopped:
            self.notes.release()

    def agreed(self) -> tuple[bool, bool]:
        """(stop, save) as all ranks' notes of the step before say; the same on all ranks."""
        self.step_seconds = max(self.step_seconds, time.monotonic() - self.noted_at)
        stop, save = self.pending()
        return stop > 0, save > 0

    def note(self) -> None:
        """Begin to tell the other ranks what this one wants; `agreed` hears the answer after the next step.

        The exchange runs beside the step, so that agreeing costs no waiting.
        """
        self.pending = self.comm.sum_later([self._reason() is not None, self._save_is_due()])
        self.noted_at = time.monotonic()

    def _reason(self) -> str | None:
        """Why this rank wants to stop; what is said now is heard a step later, and an epoch may end there."""
        return self.notes.reason(needed=2 * self.save_seconds + 3 * self.step_seconds + self.evaluate_seconds)

    def _save_is_due(self) -> bool:
        minutes = self.config.resume.save_minutes
        return minutes is not None and self.comm.rank == 0 and time.monotonic() - self.saved_at > 60 * minutes

    def saved(self, seconds: float) -> None:
        """A checkpoint was written."""
        self.saved_at, self.save_seconds = time.monotonic(), max(self.save_seconds, seconds)

    def evaluated(self, seconds: float) -> None:
        """The validation images were seen."""
        self.evaluate_seconds = max(self.evaluate_seconds, seconds)

    def stopped(self, step: int) -> Stopped:
        """Why the ranks stop, in the words of the first that wanted to; the STOP file has done its work."""
        said = self.comm.gather(self._reason(), "reason to stop")
        if self.comm.rank == 0:
            self.stop_file.unlink(missing_ok=True)
        rank, reason = next(((r, text) for r, text in enumerate(said) if text), (0, "unknown"))
        return Stopped(step, reason + f" on rank {rank}" * reason.startswith("signal"))

    # --- numbers ------------------------------------------------------------------------------------------------------

    def broken(self, norm: float, progress: Progress) -> str | None:
        """What to say of a gradient that is not finite; None for a sound one. Raises when the policy says so.

        The norm is that of the averaged gradient, so every rank comes to the same conclusion without asking.
        """
        if math.isfinite(norm):
            return None
        if self.job.scaler.is_enabled():
            if self.job.scaler.get_scale() >= 1:
                return None  # an overflow of fp16: the scaler skipped the step and lowered its scale
            raise Diverged(f"step {progress.step}: the loss scale fell below 1, the gradients are not finite at any")
        names = not_finite(self.job.model.named_parameters())
        text = f"step {progress.step}: the gradient of {names[0] if names else 'no single tensor'}" + (
            f" and {len(names) - 1} more tensors" * (len(names) > 1) + " is not finite"
        )
        progress.skipped += 1
        policy = self.config.guard.nonfinite
        if policy == "stop" or progress.skipped > self.config.guard.max_skips:
            raise Diverged(text + f" ({progress.skipped} such steps)" * (policy != "stop"))
        if policy == "rollback":
            raise RollBack(text)
        return text

    def compare_replicas(self, step: int) -> None:
        """Raise `Diverged` when the weights of a rank are not those of rank 0, naming ranks and first tensor."""
        named = list(self.job.model.named_parameters())
        rows = self.comm.gather(tensor_sums(p for _, p in named), "checksums")
        found = first_difference([name for name, _ in named], rows)
        with ranks.averaged_buffers(self.job.model, self.comm):
            means = self.comm.gather(tensor_sums(ranks.float_buffers(self.job.model)), "checksums of buffers")
        buffers = [name for name, b in self.job.model.named_buffers() if b.is_floating_point()]
        found = found or first_difference([f"the mean of {name}" for name in buffers], means)
        if found:
            odd, name = found
            raise Diverged(
                f"step {step}: the weights of rank {', '.join(map(str, odd))} differ from rank 0's, first in {name}: "
                f"a sick node, or a rank that steps differently; continue from the last checkpoint without it"
            )
