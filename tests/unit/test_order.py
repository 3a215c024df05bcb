"""The order of images: pure, disjoint, complete, and the same for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lars.data import TrainOrder, ValOrder, shard_indices, validation_range
from dist_lars.data.order import permutation


def test_the_permutation_never_changes():
    # Frozen values: a run must resume with the same order under another version of numpy.
    assert permutation(10, 0, 0).tolist() == [8, 2, 4, 3, 6, 0, 9, 1, 5, 7]
    assert permutation(10, 2**40 + 5, 3).tolist() != permutation(10, 5, 3).tolist()


shapes = st.tuples(st.integers(1, 400), st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**60))


@given(shapes)
@settings(max_examples=60)
def test_ranks_share_each_step_without_overlap(shape):
    n, size, per_rank, seed = shape
    batch = size * per_rank
    whole = permutation(n, seed, 1)[: n // batch * batch].reshape(-1, batch)
    shards = [shard_indices(n, seed, 1, r, size, batch) for r in range(size)]
    assert np.array_equal(np.concatenate(shards, axis=1), whole)  # the images of step k, in order of rank
    assert len(set(whole.reshape(-1).tolist())) == whole.size


def test_512_ranks_in_one_process():
    shards = [shard_indices(1_281_167, 0, 0, r, 512, 8192) for r in (0, 200, 511)]
    assert [s.shape for s in shards] == [(156, 16)] * 3


def test_another_epoch_has_another_order():
    assert not np.array_equal(shard_indices(100, 0, 0, 0, 1, 10), shard_indices(100, 0, 1, 0, 1, 10))


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="global batch 10 does not divide by 3 ranks"):
        shard_indices(100, 0, 0, 0, 3, 10)


@given(st.integers(0, 300), st.integers(1, 12))
def test_validation_covers_every_image_once(n, size):
    ranges = [validation_range(n, r, size) for r in range(size)]
    assert [i for r in ranges for i in r] == list(range(n))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def order(rank: int, size: int, start: int = 0) -> list[list[tuple[int, int]]]:
    return list(TrainOrder(50, 7, rank, size, global_batch=12, micro_batch=3, start=start, stop=10))


def test_micro_batches_are_the_same_for_any_number_of_ranks():
    alone = order(0, 1)  # 4 micro-batches a step
    for size in (2, 4):
        parts = [order(r, size) for r in range(size)]
        per_step = 4 // size
        for step in range(10):
            together = [m for p in parts for m in p[step * per_step : (step + 1) * per_step]]
            assert together == alone[step * 4 : (step + 1) * 4]


def test_starting_in_the_middle_of_an_epoch_continues_the_same_order():
    assert order(1, 2, start=6) == order(1, 2)[6 * 2 :]


def test_validation_batches():
    assert list(ValOrder(range(3, 8), 2)) == [[(0, 3), (0, 4)], [(0, 5), (0, 6)], [(0, 7)]]
