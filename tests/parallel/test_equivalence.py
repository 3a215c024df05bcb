"""The same training on 1, 2, 3 and 4 real ranks: equal to 1e-10 in float64, replicas equal to the last bit."""

import pytest

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def runs(shared):
    """{ranks: [result of each rank]}, and "again": 3 ranks a second time."""
    launches = {1: (1,), **{n: (n, "horovod by MPI") for n in (2, 3, 4)}, "again": (3, "horovod by MPI", True)}
    return {name: [rank["training"] for rank in shared(*words)] for name, words in launches.items()}


@pytest.mark.parametrize("kind", ["plain", "clipped", "dropout"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_times_passes_do_not_matter(runs, kind, size):
    alone, shared = runs[1][0][kind], runs[size][0][kind]
    assert (alone["accumulation"], shared["accumulation"]) == (12, 12 // size)
    assert shared["buckets"] > 1
    assert shared["weights"] == pytest.approx(alone["weights"], abs=1e-10)
    assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-10)


def test_the_runs_differ_where_they_should(runs):
    one = runs[1][0]
    assert one["plain"]["weights"] != pytest.approx(one["clipped"]["weights"], abs=1e-6)
    assert one["plain"]["losses"] != pytest.approx(one["dropout"]["losses"], abs=1e-6)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_start_with_the_weights_of_rank_0(runs, size):
    starts = [rank["start"] for rank in runs[size]]
    assert len({tuple(s["before"]) for s in starts}) == size
    assert all(s["after"] == starts[0]["before"] for s in starts)


@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_replicas_stay_equal_to_the_last_bit(runs, kind, size):
    """After every one of 20 steps."""
    histories = [rank[kind]["checksums"] for rank in runs[size]]
    assert all(h == histories[0] for h in histories)


@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm"])
def test_three_ranks_are_repeatable_when_deterministic(runs, kind):
    assert runs["again"][0][kind]["weights"] == runs[3][0][kind]["weights"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_batchnorm_buffers_are_each_ranks_own_and_their_mean_evaluates(runs, size):
    own = [rank["batchnorm"]["buffers"] for rank in runs[size]]
    mean = [sum(values) / size for values in zip(*own, strict=True)]
    assert own[0] != own[1]
    for rank in runs[size]:
        assert rank["batchnorm"]["averaged"] == pytest.approx(mean, rel=1e-12)
        assert rank["batchnorm"]["restored"]
