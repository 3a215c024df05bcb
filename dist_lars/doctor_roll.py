"""What keeps the doctor from hanging on a cluster: a roll of who stands where, a deadline, and a verdict in a file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dist_lars.doctor_host import Check
from dist_lars.doctor_verdict import exclude, fail, some, spans

EXIT_SICK = 3  # a check failed: no other launcher would help
EXIT_APART = 4  # the ranks do not find each other: another launcher may
JOINING = "joining the other ranks"


def as_json(checks: Sequence[Check]) -> str:
    """A list of checks, for programs."""
    return json.dumps([dataclasses.asdict(check) for check in checks], indent=1)


class Roll:
    """Who is where: one small file per rank in RUN_DIR/preflight, so that a silent rank has a name."""

    def __init__(self, run_dir: Path | None, rank: int) -> None:
        self.run_dir, self.rank, self.stage = run_dir, rank, ""
        self.folder = run_dir / "preflight" if run_dir is not None else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def at(self, stage: str) -> None:
        """This rank now does `stage`."""
        self.stage = stage
        if self.folder is not None:
            _replace(self.folder / f"rank{self.rank}", f"{socket.gethostname()}\n{stage}")

    def call(self) -> dict[int, tuple[str, str]]:
        """{rank: (host, stage)} of every rank that has come so far."""
        found = {}
        for path in self.folder.glob("rank*") if self.folder is not None else ():
            host, _, stage = path.read_text(encoding="utf-8").partition("\n")
            found[int(path.name.removeprefix("rank"))] = (host, stage)
        return found

    def conclude(self, checks: Sequence[Check]) -> None:
        """Write the verdict; the roll has done its work."""
        if self.run_dir is not None and self.folder is not None:
            _replace(self.run_dir / "preflight.json", as_json(checks))
            shutil.rmtree(self.folder, ignore_errors=True)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


class Deadline:
    """Ends this process when the examination takes too long, and names the ranks that are behind the others."""

    def __init__(self, roll: Roll, seconds: float) -> None:
        # the first rank that is alive speaks; the others follow only if it does not
        self.roll, self.seconds = roll, seconds
        self.timer = threading.Timer(seconds + min(roll.rank, 5), self._end)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()

    def _end(self) -> None:
        who, joining = f"rank {self.roll.rank} on {socket.gethostname()}", self.roll.stage == JOINING
        text = f"{who} waited {self.seconds:.0f} s while {self.roll.stage}"
        reason, repair = behind(self.roll.call(), _launched())
        print(f"error: {text}: {reason}\n  -> {repair}", file=sys.stderr, flush=True)
        if not joining:
            self.roll.conclude([fail("progress", f"{text}: {reason}", repair)])
        os._exit(EXIT_APART if joining else EXIT_SICK)


def _launched() -> int:
    return int(os.environ.get("DIST_LARS_RANKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 0)


def behind(called: dict[int, tuple[str, str]], launched: int) -> tuple[str, str]:
    """(which ranks did not come as far as the others, what to do); `called` is {rank: (host, stage)}."""
    absent = [r for r in range(launched) if r not in called]
    if absent:
        hosts = some([host for host, _ in called.values()], most=16)
        return f"rank {spans(absent)} never started", f"exclude the node of the job that is not among {hosts}"
    stages = {stage: [r for r, (_, s) in called.items() if s == stage] for _, stage in called.values()}
    if len(stages) < 2:
        return (
            "all ranks wait for each other",
            "a firewall or the wrong network between nodes: INTERFACE in slurm/site.sh",
        )
    few = min(stages.values(), key=len)
    sick = [called[r][0] for r in few]
    text = f"rank {spans(few)} on {some(sick)} stands at {called[few[0]][1]!r}, the others do not"
    return text, exclude(sick)
