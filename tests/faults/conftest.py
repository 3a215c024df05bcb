"""Jobs to break, and the table of what happened to each."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dist_lars import checkpoint, runlog
from tests.conftest import LAUNCHERS, ROOT, TORCHRUN, environment, paint

ROWS: list[tuple[str, str, float, str]] = []
WORKER = str(ROOT / "tests" / "faults" / "worker.py")
EPOCHS, STEPS = 6, 8  # of the job that is broken: 48 steps, each a few hundredths of a second


@dataclass
class Job:
    """A running training job of ours, in its own folder."""

    folder: Path
    images: Path
    options: tuple[str, ...] = ()
    launcher: str = "mpirun"
    ranks: int = 2
    process: Any = None
    output: str = ""
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def launch(self) -> list[str]:
        """The words that start what follows them on every rank."""
        return [*{**LAUNCHERS, "torchrun": TORCHRUN}[self.launcher], str(self.ranks)]

    def start(self, fault: str = "none", rank: int = 0, step: int = 0, **extra: str) -> "Job":
        """Start it; `fault` is one of tests/faults/worker.py."""
        phases = self.folder / "phases"
        phases.mkdir(parents=True, exist_ok=True)
        words = [
            *self.launch(), sys.executable, WORKER, fault, str(rank), str(step), *OPTIONS,
            "--data.path", str(self.images), "--run_dir", str(self.run_dir),
            *self.options,
        ]  # fmt: skip
        self.log = (self.folder / "output.txt").open("a+")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            words, cwd=self.folder, env=environment(FAULT_PHASES=str(phases), **extra), stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self

    def wait(self, timeout: float = 60) -> int:
        """Its exit code; a job that does not end is a failed test."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            pytest.fail(f"no end after {timeout:g} s:\n{self.text()[-3000:]}")
        self.seconds = time.monotonic() - self.started
        return code

    def finish(self, **extra: str) -> int:
        """Run it (again) to the end."""
        return self.start(**extra).wait(120)

    def text(self) -> str:
        return (self.folder / "output.txt").read_text()

    def phase(self, rank: int) -> tuple[int, str]:
        """(process id, what it is doing) of a rank; (0, "") before it says so."""
        try:
            pid, _, what = (self.folder / "phases" / f"rank{rank}").read_text().partition(" ")
            return int(pid), what
        except (FileNotFoundError, ValueError):
            return 0, ""

    def wait_for(self, what: str, rank: int = 0, timeout: float = 60) -> int:
        """The process id of a rank once it does something that matches."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            pid, doing = self.phase(rank)
            if pid and re.search(what, doing):
                return pid
            if self.process.poll() is not None:
                pytest.fail(f"the job ended before {what!r}:\n{self.text()[-3000:]}")
            time.sleep(0.002)
        self.kill_everything()
        return pytest.fail(f"never reached {what!r}:\n{self.text()[-3000:]}")

    def pids(self) -> list[int]:
        """Every process of this job that is still there, ranks and loaders."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if str(self.run_dir).encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def kill_everything(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def orphans(self, patience: float = 15) -> list[int]:
        """Processes that outlive the launcher."""
        end = time.monotonic() + patience
        while self.pids() and time.monotonic() < end:
            time.sleep(0.1)
        return self.pids()

    def saved_step(self) -> int:
        """Of the newest good checkpoint, 0 without one."""
        path, _ = checkpoint.newest_good(self.run_dir)
        return checkpoint.load(path)["step"] if path else 0

    def last_step(self) -> int:
        """The last step that the log tells of."""
        try:
            lines = runlog.read(self.run_dir, "train")
        except FileNotFoundError:
            return 0
        return lines[-1]["step"] if lines else 0

    def status(self) -> dict[str, Any]:
        return runlog.read_status(self.run_dir) or {}


OPTIONS = (
    "--preset", "quickstart", "--data.kind", "folder", "--data.image_size", "32", "--data.resize", "32",
    "--model.name", "cnn_small", "--batch_size", "8", "--micro_batch", "4", "--epochs", str(EPOCHS),
    "--schedule.warmup_epochs", "1", "--log.every_steps", "1", "--log.tensorboard", "false", "--resume.save_steps", "3",
)  # fmt: skip


@pytest.fixture(scope="session")
def fault_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder for STEPS steps of 8 images per epoch, and 9 images for validation."""
    return paint(tmp_path_factory.mktemp("images"), 8 * STEPS, 9)


@pytest.fixture
def job(tmp_path: Path, fault_images: Path) -> Any:
    """`job(options...)` makes a job in a folder of its own; whatever is left of it is killed in the end."""
    made: list[Job] = []

    def make(*options: str, **settings: Any) -> Job:
        folder = tmp_path / f"job{len(made)}"
        folder.mkdir()
        made.append(Job(folder, settings.pop("images", fault_images), options, **settings))
        return made[-1]

    yield make
    for one in made:
        one.kill_everything()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Any:
    """`tell("kill -9 of rank 1", "continued", seconds, lost)` adds a row to the table."""
    return lambda fault, what, seconds, lost="-": ROWS.append((fault, what, seconds, str(lost)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of faults."""
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{'fault':<58} {'what happened':<58} {'seconds':>7}  lost steps")
    for fault, what, seconds, lost in ROWS:
        write(f"{fault:<58} {what:<58} {seconds:>7.1f}  {lost}")
