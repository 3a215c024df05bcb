"""Jobs to break, and the table of what happened to each."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
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

    @property
    def phases(self) -> Path:
        """Where ranks say what they do, and read where to wait; its name marks every process of this job."""
        return self.folder / "phases"

    def start(self, fault: str = "none", rank: int = 0, step: int = 0, **extra: str) -> "Job":
        """Start it; `fault` is one of tests/faults/worker.py."""
        self.phases.mkdir(parents=True, exist_ok=True)
        words = [
            *self.launch(), sys.executable, WORKER, fault, str(rank), str(step), *OPTIONS,
            "--data.path", str(self.images), "--run_dir", str(self.run_dir),
            *self.options,
        ]  # fmt: skip
        self.log = (self.folder / "output.txt").open("a+")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            words, cwd=self.folder, env=environment(FAULT_PHASES=str(self.phases), **extra), stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self

    def wait(self, timeout: float = 240) -> int:
        """Its exit code; a job that does not end is a failed test. The time is for a very busy machine."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            pytest.fail(f"no end after {timeout:g} s:\n{self.text()[-3000:]}")
        self.seconds = time.monotonic() - self.started
        return code

    def finish(self, **extra: str) -> int:
        """Run it (again) to the end."""
        return self.start(**extra).wait(480)

    def text(self) -> str:
        return (self.folder / "output.txt").read_text()

    def phase(self, rank: int) -> tuple[int, str]:
        """(process id, what it is doing) of a rank; (0, "") before it says so."""
        try:
            pid, _, what = (self.phases / f"rank{rank}").read_text().partition(" ")
            return int(pid), what
        except (FileNotFoundError, ValueError):
            return 0, ""

    @contextlib.contextmanager
    def held(self, what: str, rank: int = 0, timeout: float = 240) -> Iterator[int]:
        """Inside, a rank waits where it first does something that matches; its process id.

        Steps take hundredths of a second, and this process may be away for longer: a fault that shall hit a phase is
        done while the rank stays in it.
        """
        hold = self.phases / f"hold{rank}"
        checkpoint.write_aside(hold, what.encode())
        try:
            yield self._reached(what, rank, timeout)
        finally:
            hold.unlink()

    def _reached(self, what: str, rank: int, timeout: float) -> int:
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

    def wait_for_signal(self, pid: int, timeout: float = 120) -> None:
        """Return when a rank has heard of a signal."""
        end = time.monotonic() + timeout
        while not (self.phases / f"signal{pid}").exists():
            if time.monotonic() > end:
                self.kill_everything()
                pytest.fail(f"process {pid} was never signalled:\n{self.text()[-3000:]}")
            time.sleep(0.002)

    def pids(self) -> dict[int, list[bytes]]:
        """{process id: environment} of every process of this job that is still there: launcher, ranks, loaders."""
        mark = f"FAULT_PHASES={self.phases}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if mark in variables:
                    found[int(entry.name)] = variables
        return found

    def rank_starts(self, rank: int, timeout: float = 120) -> int:
        """The process id of a rank as soon as mpirun has made it."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for pid, variables in self.pids().items():
                if f"OMPI_COMM_WORLD_RANK={rank}".encode() in variables:
                    return pid
            time.sleep(0.005)
        self.kill_everything()
        return pytest.fail(f"rank {rank} never started:\n{self.text()[-3000:]}")

    def loader_workers(self, pid: int) -> list[int]:
        """Loader workers of a rank: children of its fork server."""
        parents = {p: parent_of(p) for p in self.pids()}
        servers = [p for p, parent in parents.items() if parent == pid and b"forkserver" in command_of(p)]
        return [p for p, parent in parents.items() if parent in servers]

    def kill_everything(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def orphans(self, patience: float = 60) -> list[int]:
        """Processes that outlive the launcher."""
        end = time.monotonic() + patience
        while self.pids() and time.monotonic() < end:
            time.sleep(0.1)
        return list(self.pids())

    def saved_at(self) -> float:
        """When the newest checkpoint was there, in seconds since the epoch."""
        return max(path.stat().st_mtime for path in (self.run_dir / "checkpoints").glob("step-*.pt"))

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

    def losses(self) -> dict[int, float]:
        """{step: loss} as the log has it, in the words of the last job that took the step."""
        return {line["step"]: line["loss"] for line in runlog.read(self.run_dir, "train")}

    def status(self) -> dict[str, Any]:
        return runlog.read_status(self.run_dir) or {}


def parent_of(pid: int) -> int:
    """0 for a process that has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_of(pid: int) -> bytes:
    """Empty for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


OPTIONS = (
    "--preset", "quickstart", "--data.kind", "folder", "--data.image_size", "16", "--data.resize", "16",
    "--model.name", "resnet_small", "--batch_size", "8", "--micro_batch", "4", "--epochs", str(EPOCHS),
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
    """Print the table of faults; with $FAULT_RECORD write it to benchmarks/records, too, if nothing failed."""
    if not ROWS:
        return
    if os.environ.get("FAULT_RECORD") and not {"failed", "error"} & set(terminalreporter.stats):
        names = ("fault", "what happened", "seconds", "lost steps")
        record.write("faults", [dict(zip(names, row, strict=True)) for row in ROWS], {})
    write = terminalreporter.write_line
    write("")
    write(f"{'fault':<58} {'what happened':<58} {'seconds':>7}  lost steps")
    for fault, what, seconds, lost in ROWS:
        write(f"{fault:<58} {what:<58} {seconds:>7.1f}  {lost}")
