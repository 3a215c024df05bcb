"""LARS and LAMB under Horovod's own optimizer wrapper: the same ratios on every rank, and no collective for them."""

from collections.abc import Callable
from typing import Any

import pytest

from dist_lars.optim import LAWS

STEPS, TENSORS = 4, 6  # of the worker's net


@pytest.mark.parametrize("ranks", [2, 4])
def test_ratios_agree_without_a_collective_of_their_own(shared: Callable[..., Any], ranks: int) -> None:
    results = [rank["wrapper"] for rank in shared(ranks, "horovod by MPI")]
    assert len(results) == ranks
    for name in ("sgd", "lamb", *LAWS):
        runs = [r["runs"][name] for r in results]
        assert all(run["kept"] for run in runs), f"{name}: a hyper-parameter was lost by the wrapper"
        assert len({run["digest"] for run in runs}) == 1, f"{name}: replicas differ"
        assert all(run["ratios"] == runs[0]["ratios"] for run in runs), f"{name}: ratios differ between ranks"
        assert all(len(ratios) == (0 if name == "sgd" else TENSORS) for ratios in runs[0]["ratios"])
        gradients_only = {"NEGOTIATE_ALLREDUCE": STEPS * TENSORS}
        assert runs[0]["collectives"] == gradients_only, f"{name}: other collectives than one per gradient"
    assert [r["blind_step"] for r in results] == [0.0] * ranks
