"""`dist_lars.train` with one fault built in: python worker.py FAULT RANK STEP [dist_lars.train's arguments].

Every rank also writes what it is doing to $FAULT_PHASES/rankN, as its watchdog hears it, and waits there as long as
$FAULT_PHASES/holdN holds an expression that matches it. A signal that it hears of leaves $FAULT_PHASES/signalPID, its
start under mpirun $FAULT_PHASES/startedN.
"""

import os
import re
import sys
import time
from pathlib import Path

import torch

from dist_lars import engine, stopping, train, watchdog


def record_phases() -> None:
    """Let every beat of the watchdog, and every signal, be seen from outside."""
    beat, note, folder = watchdog.Watchdog.beat, stopping.StopNotes._note, Path(os.environ["FAULT_PHASES"])

    def told(self: watchdog.Watchdog, what: str) -> None:
        beat(self, what)
        (folder / f"rank{self.rank}").write_text(f"{os.getpid()} {what}")
        while held(folder / f"hold{self.rank}", what):
            time.sleep(0.002)

    def noted(self: stopping.StopNotes, *args) -> None:
        note(self, *args)
        (folder / f"signal{os.getpid()}").touch()

    watchdog.Watchdog.beat, stopping.StopNotes._note = told, noted


def held(hold: Path, what: str) -> bool:
    try:
        return re.search(hold.read_text(), what) is not None
    except FileNotFoundError:
        return False


def break_at(fault: str, rank: int, at: int) -> None:
    """Make `rank` fail at step `at`, once per run directory."""
    step_of = engine.train_step
    marker = Path(os.environ["FAULT_PHASES"]) / "done"

    def broken(job, stream, step, counts, clock):
        if step == at and job.comm.rank == rank and not marker.exists():
            if fault in ("weight", "nan", "slow"):
                marker.touch()
            FAULTS[fault](job)
        return step_of(job, stream, step, counts, clock)

    engine.train_step = broken


def spoil_weight(job: engine.Job) -> None:
    with torch.no_grad():
        weight = list(job.model.parameters())[3]
        weight[(0,) * weight.dim()] += 1e-6


def spoil_gradient(job: engine.Job) -> None:
    """One nan in one gradient of one rank, of one step."""
    parameter = list(job.model.parameters())[3]

    def once(gradient: torch.Tensor) -> torch.Tensor:
        hook.remove()
        gradient = gradient.clone()
        gradient[(0,) * gradient.dim()] = float("nan")
        return gradient

    hook = parameter.register_hook(once)


def hang(job: engine.Job) -> None:
    time.sleep(3600)


FAULTS = {"weight": spoil_weight, "nan": spoil_gradient, "hang": hang, "slow": lambda job: time.sleep(2)}


def main() -> None:
    fault, rank, step, *arguments = sys.argv[1:]
    record_phases()
    (Path(os.environ["FAULT_PHASES"]) / f"started{os.environ.get('OMPI_COMM_WORLD_RANK', '')}").touch()
    if fault != "none":
        break_at(fault, int(rank), int(step))
    train.main(arguments)


if __name__ == "__main__":
    main()
