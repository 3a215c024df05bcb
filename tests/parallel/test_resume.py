"""Resumed equals never stopped, to the last bit: weights, averages, momentum, all ranks' buffers, values of the log."""

import pytest

pytestmark = pytest.mark.parallel
WORKER = "tests/parallel/worker_resume.py"


@pytest.mark.parametrize(
    ("ranks", "stops"),
    [
        pytest.param(1, [], id="1 rank"),
        pytest.param(2, [], id="2 ranks"),
        pytest.param(3, ["4", "9"], id="3 ranks, deterministic", marks=pytest.mark.faults),
    ],
)
def test_any_step_to_stop_at(launch, ranks, stops):
    first = launch(ranks, WORKER, *stops, timeout=400)[0]
    assert first.pop("saving") == []  # saving changes nothing of what is computed
    assert first.pop("own") is (ranks > 1)
    assert first == {stop: [] for stop in stops or map(str, range(1, 12))}
