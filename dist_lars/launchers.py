"""What its launcher tells a process: how many ranks were started, and which of them it is."""

import itertools
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from dist_lars.errors import UserError


class Place(NamedTuple):
    """One rank among the others; `launcher` is a key of LAUNCHERS."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int


class Variables(NamedTuple):
    """Where a launcher writes what; it is this launcher when `mark` is set."""

    mark: str
    size: str
    rank: str
    local_rank: str
    local_size: str


# The innermost launcher counts, and stands first: torchrun is started by srun on each node, and mpirun inside sbatch
# also sees the batch step's own SLURM variables.
LAUNCHERS = {
    "torchrun": Variables("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": Variables("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
                        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "horovodrun": Variables("HOROVOD_SIZE", "HOROVOD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_RANK",
                            "HOROVOD_LOCAL_SIZE"),
    "srun": Variables("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID",
                      "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip


def launcher_of(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process; None for a process started alone."""
    return next((name for name, v in LAUNCHERS.items() if environment.get(v.mark)), None)


def expected_ranks(environment: Mapping[str, str]) -> tuple[int | None, str]:
    """How many ranks the launcher says it started, and which variable says so; (None, "") for a process alone.

    $DIST_LARS_RANKS, written into a launch line, has the last word.
    """
    launcher = launcher_of(environment)
    for name in ("DIST_LARS_RANKS", LAUNCHERS[launcher].size if launcher else ""):
        if environment.get(name):
            if not environment[name].isdigit() or int(environment[name]) < 1:
                raise UserError(f"{name} is {environment[name]!r}, but it must be the number of ranks that are started")
            return int(environment[name]), name
    return None, ""


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Which rank this process is; None for a process started alone. Raises `UserError` for half an answer."""
    launcher = launcher_of(environment)
    if launcher is None:
        return None
    v = LAUNCHERS[launcher]
    missing = [name for name in v[1:] if not environment.get(name)]
    if missing:
        raise UserError(f"{v.mark} is set, as {launcher} does, but {', '.join(missing)} is not: start all ranks alike")
    if launcher == "srun":
        here = tasks_per_node(environment[v.local_size])[int(environment.get("SLURM_NODEID", "0"))]
    else:
        here = int(environment[v.local_size])
    return Place(launcher, int(environment[v.rank]), int(environment[v.size]), int(environment[v.local_rank]), here)


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form written out: "2(x3),1" is [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(p[1]) for p in parts if p for _ in range(int(p[2] or 1))]


def host_names(nodes: str) -> list[str]:
    """A SLURM node list written out: "gpu[07-09,12],login1" is gpu07, gpu08, gpu09, gpu12, login1."""
    found: list[str] = []
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodes):
        # "rack[1-2]gpu[1-4]" splits into text and numbers in turns
        parts = [_numbers(part) if i % 2 else [part] for i, part in enumerate(re.split(r"\[([^\]]*)\]", name))]
        found += map("".join, itertools.product(*parts))
    return found


def _numbers(text: str) -> list[str]:
    """What stands in brackets: "07-09,12" is 07, 08, 09, 12."""
    ends = [part.partition("-") for part in text.split(",")]
    return [str(n).zfill(len(a)) for a, _, b in ends for n in range(int(a), int(b or a) + 1)]


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """True unless the environment says that this is another rank than 0: messages are printed once."""
    return all(rank == "0" for rank in _ranks(environment))


def rank_of(environment: Mapping[str, str] = os.environ) -> str:
    """Which rank this process is, for people: "0" for a process started alone."""
    return next(iter(_ranks(environment)), "0")


def _ranks(environment: Mapping[str, str]) -> list[str]:
    """What each launcher says, the innermost first."""
    marks = {v.mark: v.rank for v in LAUNCHERS.values()} | {"PMIX_RANK": "PMIX_RANK", "PMI_RANK": "PMI_RANK"}
    return [environment.get(rank, "0") for mark, rank in marks.items() if environment.get(mark)]
