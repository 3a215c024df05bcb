"""The networks of the recipes under two real ranks, and averaged weights across a resume."""

import math

import pytest

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def ranks(launch_once):
    return launch_once(2, "tests/parallel/worker_models.py", timeout=300)


@pytest.mark.parametrize("name", ["alexnet", "alexnet_bn", "resnet18", "resnet50"])
def test_three_steps_at_224_pixels(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert first["losses"] == second["losses"]
    assert all(math.isfinite(loss) for loss in first["losses"])
    assert first["losses"][-1] < first["losses"][0]  # the same four images each time
    assert first["before"] == second["before"] != first["after"] == second["after"]


def test_a_resumed_run_has_the_same_averaged_weights(ranks):
    """Weights, their average, and the BatchNorm buffers of both, of every rank: to the last bit."""
    for rank in (r["resume"] for r in ranks):
        assert rank["different"] == []
        assert rank["scores"][0] == rank["scores"][1]
        assert rank["averaged"]
        assert rank["own"]


def test_averages_can_begin_at_a_resume(ranks):
    """They start from the weights of the checkpoint, and training itself does not notice them."""
    for rank in (r["ema"] for r in ranks):
        assert rank["trained_alike"]
        assert rank["off"] < 1e-6 < 1e-4 < rank["moved"]
