"""Starting ranks is what costs: each number of ranks starts once with each carrier; many tests read that launch."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import start_ranks

# (ranks, who carries gradients: a key of CARRIERS)
LAUNCHES = [
    *((n, "horovod by MPI") for n in (1, 2, 3, 4)),
    *((n, carrier) for n in (1, 2, 3) for carrier in ("horovod by gloo", "torch under torchrun")),
    (2, "torch under mpirun"),
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """`shared(3, "horovod by MPI")` -> what worker_shared.py says, one dict per rank; no carrier: one process alone."""

    @functools.cache
    def run(size: int, carrier: str | None = None, again: bool = False) -> list[dict[str, Any]]:
        words = [] if carrier else ["alone"]
        folder = tmp_path_factory.mktemp("ranks")
        return start_ranks(folder, size, "tests/parallel/worker_shared.py", *words, carrier=carrier,
                           HOROVOD_TIMELINE="DYNAMIC")  # fmt: skip

    return run


@pytest.fixture(scope="session", params=LAUNCHES, ids=lambda p: f"{p[0]} {p[1]}")
def everywhere(request: pytest.FixtureRequest, shared: Callable[..., Any]) -> tuple[str, list[dict[str, Any]]]:
    """(carrier, results) of every launch in turn."""
    size, carrier = request.param
    return carrier, shared(size, carrier)
