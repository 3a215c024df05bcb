"""What keeps the doctor from hanging on a cluster: a roll of who stands where, a deadline, and a verdict in a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_lars.doctor_host import Check, as_json
from dist_lars.doctor_reach import Door, cut_off, host_name, open_door, unreached
from dist_lars.doctor_verdict import exclude, fail, some, spans
from dist_lars.launchers import expected_ranks, host_names, launcher_of

EXIT_SICK = 3  # a check failed: no other launcher would help
EXIT_APART = 4  # the ranks do not find each other: another launcher may
EXIT_SLOW = 5  # ranks still import: with more time they may come
VERDICT = "preflight.json"
IMPORTING = "importing torch"  # a stage: thousands of files, from wherever the environment lies
ANSWER = 5.0  # seconds that the ranks are given to answer when the time is up for the first of them
OVER = "over"  # a file: it is up
SLOW = "importing"  # a file in RUN_DIR/preflight, for launchers that change exit codes: EXIT_SLOW


class Stand(NamedTuple):
    """Where a rank is; `answers` once it has noticed that the time is up, and then which hosts it does not reach."""

    door: Door
    stage: str
    answers: bool = False
    unreached: dict[str, str] | None = None

    @property
    def host(self) -> str:
        """Where it runs."""
        return self.door.host


class Roll:
    """Who is where: one small file per rank in RUN_DIR/preflight, so that a silent rank has a name."""

    def __init__(self, run_dir: Path | None, rank: int) -> None:
        self.run_dir, self.rank, self.stage = run_dir, rank, ""
        # One for each launch, so that nothing of an earlier one is taken for this one's.
        launch = re.sub(r"\W", "_", os.environ.get("PMIX_NAMESPACE") or "launch")
        self.folder = run_dir / "preflight" / launch if run_dir is not None else None
        self.listener, self.door = open_door()
        if run_dir is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                (run_dir / VERDICT).unlink(missing_ok=True)  # of an earlier examination

    def at(self, stage: str, answers: bool = False, unreached: dict[str, str] | None = None) -> None:
        """This rank now does `stage`."""
        self.stage = stage
        if self.folder is not None:
            with contextlib.suppress(FileNotFoundError):  # another rank has come to its verdict
                _replace(self.folder / f"rank{self.rank}", json.dumps([self.door, stage, answers, unreached]))

    def call(self) -> dict[int, Stand]:
        """{rank: where it is} of every rank that has come so far."""
        found = {}
        for path in self.folder.glob("rank*") if self.folder is not None else ():
            with contextlib.suppress(FileNotFoundError):
                door, *rest = json.loads(path.read_text(encoding="utf-8"))
                found[int(path.name.removeprefix("rank"))] = Stand(Door(*door), *rest)
        return dict(sorted(found.items()))

    def conclude(self, checks: Sequence[Check]) -> None:
        """Write the verdict, unless another rank has; what follows the first failure is its consequence."""
        if self.run_dir is not None and self.folder is not None and not (self.run_dir / VERDICT).exists():
            _replace(self.run_dir / VERDICT, as_json(checks))
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


class Deadline:
    """Ends this process when the examination takes too long, and names the ranks that are behind the others."""

    def __init__(self, roll: Roll, seconds: float) -> None:
        self.roll, self.seconds = roll, seconds
        self.done = threading.Event()
        self.watch = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.watch.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()

    def _watch(self) -> None:
        end = time.monotonic() + self.seconds
        while not self.done.wait(1.0):
            # Ranks do not start at the same moment: the first whose time is up asks the others, too.
            if time.monotonic() > end or (self.roll.folder is not None and (self.roll.folder / OVER).exists()):
                code = EXIT_APART
                try:
                    code = self._end()
                finally:
                    os._exit(code)

    def _end(self) -> int:
        """Say who is behind; the exit code."""
        text = f"rank {self.roll.rank} on {host_name()} waited {self.seconds:.0f} s while {self.roll.stage}"
        if self.roll.folder is None:
            print(f"error: {text}; with --run_dir DIR it would say for whom", file=sys.stderr, flush=True)
            return EXIT_APART
        with contextlib.suppress(FileNotFoundError):
            (self.roll.folder / OVER).touch()
        self.roll.at(self.roll.stage, answers=True)
        began, called = time.monotonic(), self.roll.call()
        if self.roll.rank == min((r for r, stand in called.items() if stand.host == self.roll.door.host), default=-1):
            doors = [stand.door for stand in called.values()]
            self.roll.at(self.roll.stage, answers=True, unreached=unreached(self.roll.door, doors))
        # The first that is alive speaks, and the launcher ends all.
        time.sleep(max(0.0, began + ANSWER + 0.5 * min(self.roll.rank, 6) - time.monotonic()))
        if self.roll.run_dir is not None and (self.roll.run_dir / VERDICT).exists():
            return EXIT_SICK  # another rank has spoken
        mine = "SLURM_STEP_NODELIST" if launcher_of(os.environ) == "srun" else "SLURM_JOB_NODELIST"
        nodes = host_names(os.environ.get(mine, ""))
        code, reason, repair = behind(self.roll.call(), _launched(), nodes)
        print(f"error: {text}: {reason}\n  -> {repair}", file=sys.stderr, flush=True)
        if code == EXIT_SICK:
            self.roll.conclude([fail("progress", f"{text}: {reason}", repair)])
        if code == EXIT_SLOW:
            (self.roll.folder.parent / SLOW).touch()
        return code


def _short(host: str) -> str:
    return host.partition(".")[0]


def _launched() -> int:
    return expected_ranks(os.environ)[0] or 0


def behind(called: dict[int, Stand], launched: int, nodes: Sequence[str] = ()) -> tuple[int, str, str]:
    """(exit code, EXIT_SICK where some ranks are worse than others; which; what to do); `nodes`: SLURM's of the job."""
    if absent := [r for r in range(launched) if r not in called]:
        here = Counter(_short(stand.host) for stand in called.values())
        known = [node for node in nodes if here[_short(node)]]
        empty = [node for node in nodes if not here[_short(node)]]
        fewer = [node for node in known if here[_short(node)] < -(-launched // len(nodes))]
        if known and (empty or fewer):
            return EXIT_SICK, f"rank {spans(absent)} never started, on {some(empty or fewer)}", exclude(empty or fewer)
        fix = f"exclude the node of the job that is not among {some([s.host for s in called.values()], most=16)}"
        return EXIT_SICK, f"rank {spans(absent)} never started", fix
    silent = [r for r, stand in called.items() if not stand.answers]
    stages = [[r for r in called if called[r].stage == stage] for stage in {s.stage for s in called.values()}]
    few = silent or min(stages, key=len)
    importing = [r for r, stand in called.items() if stand.stage == IMPORTING]
    if importing and not silent:
        hosts = some([called[r].host for r in importing])
        everyone = len(importing) == len(called)
        who = "all ranks do" if everyone else f"rank {spans(importing)} still is {IMPORTING} on {hosts}"
        fix = "try again, for the files may be in the nodes' memory now; or a container, which is one file (README.md)"
        return EXIT_SLOW, f"{who}: the environment lies on a slow file system", fix
    lost = cut_off(stand.unreached for stand in called.values() if stand.unreached)
    if lost and not silent:
        text = " and ".join(f"{host} ({address})" for host, address in list(lost.items())[:8])
        if len(lost) < len({stand.host for stand in called.values()}):
            return EXIT_SICK, f"no connection from the other nodes to {text}", exclude(list(lost))
        fix = "a firewall between nodes, or the wrong network: INTERFACE in slurm/site.sh"
        return EXIT_APART, f"the nodes do not reach each other: {text}", fix
    if len(few) == len(called):
        fix = "a firewall or the wrong network between nodes: INTERFACE in slurm/site.sh; or another LAUNCHER"
        return EXIT_APART, "all ranks wait for each other", fix
    sick = [called[r].host for r in few]
    what = "and answers no more" if silent else "while the others do not"
    return EXIT_SICK, f"rank {spans(few)} on {some(sick)} stands at {called[few[0]].stage!r} {what}", exclude(sick)
