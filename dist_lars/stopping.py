"""Reasons to stop at the next step boundary: a signal, a STOP file, the end of the allotted time.

A signal handler only takes a note; the ranks agree on it between two steps, save, and leave with exit code 75.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from dist_lars.rules import seconds_of

EXIT_STOPPED = 75  # EX_TEMPFAIL: not finished, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
MARGIN = 10.0  # seconds kept free before a time limit, beside a save and two steps


class StopNotes:
    """What this rank knows of reasons to stop: `reason()` is None or a text. Rank 0 also watches file and clock."""

    def __init__(self, stop_file: Path | None = None, deadline: float | None = None) -> None:
        self.stop_file, self.deadline = stop_file, deadline
        self.signal: str | None = None
        self.before: dict[int, Any] = {}  # the handlers that `listen` replaced

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR2 as requests to save and stop; a second one ends this process at once."""
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def release(self) -> None:
        """Give the signals back to what handled them before `listen`: a notebook outlives its runs."""
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was set by C, and cannot be had back
        self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(EXIT_STOPPED)
        self.signal = signal.Signals(number).name

    def reason(self, needed: float = 0.0) -> str | None:
        """Why to stop now; `needed` is how many seconds a save and the next steps will take."""
        if self.signal is not None:
            return f"signal {self.signal}"
        if self.stop_file is not None and self.stop_file.exists():
            return f"file {self.stop_file.name}{self._said()}"
        if self.deadline is not None and time.time() + needed + MARGIN > self.deadline:
            return "time limit"
        return None

    def _said(self) -> str:
        try:
            text = self.stop_file.read_text(encoding="utf-8").strip()[:100] if self.stop_file else ""
        except OSError:  # removed again by now
            text = ""
        return f", which says: {text}" if text else ""


def deadline(max_time: str | None, started: float, environment: Mapping[str, str]) -> float | None:
    """The earlier of `max_time` after `started` and SLURM's own end of the job, in seconds since the epoch."""
    own = None if max_time is None else started + seconds_of(max_time)
    both = [t for t in (own, slurm_end(environment)) if t is not None]
    return min(both, default=None)


def slurm_end(environment: Mapping[str, str], run: Callable[..., Any] = subprocess.run) -> float | None:
    """When SLURM will end this job: $SLURM_JOB_END_TIME, else asked from scontrol; None outside SLURM."""
    told = environment.get("SLURM_JOB_END_TIME")
    if told:
        return float(told)
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return None
    try:
        shown = run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    end = re.search(r"EndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", shown)
    return datetime.fromisoformat(end[1]).timestamp() if end else None
