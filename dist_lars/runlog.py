"""What a run says: one JSON object per line, TensorBoard, status.json, a progress bar. Written by rank 0 only.

`read` is the way back: tests, plots and benchmarks use it and nothing else.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dist_lars.checkpoint import write_aside

LINES, BOARD = "log.jsonl", "TensorBoard's file"


def read(run_dir: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of RUN_DIR/log.jsonl, oldest first, those of one kind if it is given (start, train, eval, end)."""
    text = (Path(run_dir) / LINES).read_text(encoding="utf-8", errors="replace")
    return [line for line in _whole(text) if kind in (None, line["kind"])]


def _whole(text: str) -> Iterator[dict[str, Any]]:
    """Without the halves of lines that killed jobs and broken disks left, wherever they stand."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def write_status(run_dir: str | Path, state: str, started: str, **facts: Any) -> None:
    """RUN_DIR/status.json: running, finished, stopped or failed, with step, reason and time.

    `started` tells jobs apart. The first failure of a job is its last word: what fails after it, fails because of it.
    """
    if not _failed(run_dir, started):
        content = {"state": state, **facts, "started": started, "time": _now()}
        write_aside(Path(run_dir) / "status.json", json.dumps(content, indent=1).encode())


def _failed(run_dir: str | Path, started: str) -> bool:
    try:
        last = read_status(run_dir) or {}
    except (OSError, ValueError):  # a sick disk, or nothing of ours: to be written anew
        return False
    return last.get("state") == "failed" and last.get("started") == started


def read_status(run_dir: str | Path) -> dict[str, Any] | None:
    """The content of status.json; None for a directory without one."""
    try:
        return json.loads((Path(run_dir) / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class RunLog:
    """Lines for machines, numbers for TensorBoard and a bar for people; with `run_dir=None` (ranks > 0) it is mute.

    On a full disk every write raises `OSError`, or with `patient` the lines wait in memory until there is room again.
    """

    def __init__(self, run_dir: str | Path | None, *, tensorboard: bool, progress: bool, patient: bool = False) -> None:
        self.file = None if run_dir is None else (Path(run_dir) / LINES).open("a+b", buffering=0)
        self.board = _board(Path(run_dir) / "tensorboard") if run_dir is not None and tensorboard else None
        self.patient, self.unwritten, self.told = patient, _missing_end(self.file), set[str]()
        self.progress = progress and run_dir is not None
        self.bar: Any = None
        self.hosts: list[str] = []  # of each rank
        self.advice = "more loader workers"  # against waiting for data
        self.slow: bool | None = None  # None: the first interval, in which workers start

    def start_bar(self, images_done: int, images_total: int) -> None:
        """Show progress in images, so that the bar's own rate is images/s and its ETA that of the run."""
        stream = sys.stderr if sys.stderr.isatty() else _Lines(sys.stderr)
        self.bar = tqdm(
            total=images_total,
            initial=images_done,
            unit=" images",
            unit_scale=True,
            disable=not self.progress,
            file=stream,
            mininterval=0.5 if sys.stderr.isatty() else 5,
            dynamic_ncols=sys.stderr.isatty(),
        )

    def advance(self, images: int, **shown: float) -> None:
        """Move the bar on; keyword values stand beside it."""
        if self.bar is None:
            return
        if shown:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self.bar.update(images)

    def waited(self, share: float) -> None:
        """Say what helps when more than a tenth of an interval went into waiting for data; once, until it is over."""
        if share > 0.1 and self.slow is False:
            self.say(f"{share:.0%} of the time goes into waiting for data: {self.advice}")
            self.line("advice", data_wait=share, text=self.advice)
        self.slow = share > 0.1 and self.slow is not None

    def line(self, kind: str, **facts: Any) -> None:
        """Append one object to log.jsonl; numbers of train and eval lines go to TensorBoard at their step."""
        if self.file is not None:
            self.unwritten += json.dumps({"kind": kind, "time": _now(), **facts}).encode() + b"\n"
            with self._patience(LINES):
                while self.unwritten:
                    self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        if self.board is not None and kind in ("train", "eval"):
            with self._patience(BOARD):
                for name, value in facts.items():
                    if isinstance(value, int | float) and name not in ("step", "epoch", "saved"):
                        self.board.add_scalar(f"{kind}/{name}", value, facts["step"])

    @contextlib.contextmanager
    def _patience(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if not self.patient:
                raise
            if what not in self.told:
                warn(f"{what} could not be written: {e.strerror}; training goes on")
            self.told.add(what)
            if what == BOARD:
                self.board = None  # TensorBoard's writer does not recover
        else:
            self.told.discard(what)

    def say(self, text: str) -> None:
        """Print for people, above the bar."""
        if self.file is not None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Close files and the bar."""
        for resource in (self.bar, self.board, self.file):
            if resource is not None:
                with self._patience(BOARD if resource is self.board else LINES):
                    resource.close()


def _missing_end(file: io.FileIO | None) -> bytes:
    """The end of the last line where a job died while it wrote it: it must not take the next line with it."""
    size = 0 if file is None else file.tell()
    return b"\n" if file is not None and size and os.pread(file.fileno(), 1, size - 1) != b"\n" else b""


def warn(text: str) -> None:
    """Tell people of what went wrong, on the error stream, where a full disk is in nobody's way."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class _Lines:
    """A stream for the bar when it is not a terminal: launchers pass on whole lines, not carriage returns."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


def _board(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is used

    return SummaryWriter(str(folder))
