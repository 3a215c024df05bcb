"""Which image is seen when, as pure functions of (seed, epoch): the same for any number of ranks and workers."""

import numpy as np


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n images in one epoch, int64 [n].

    RandomState is used since numpy promises never to change its stream: a run resumes the same under a newer numpy.
    """
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch]).permutation(n)


def shard_indices(n: int, seed: int, epoch: int, rank: int, size: int, global_batch: int) -> np.ndarray:
    """The images of one rank in one epoch, int64 [steps, global_batch // size].

    Step k sees images [k * B, (k + 1) * B) of the epoch's permutation whatever the number of ranks; rank r takes the
    r-th contiguous run of them, so that its consecutive micro-batches are the same ones that a single rank would
    have formed. The last n % B images of the permutation are left out.
    """
    if global_batch % size:
        raise ValueError(f"global batch {global_batch} does not divide by {size} ranks")
    steps = n // global_batch
    grid = permutation(n, seed, epoch)[: steps * global_batch].reshape(steps, size, global_batch // size)
    return grid[:, rank]


def validation_range(n: int, rank: int, size: int) -> range:
    """This rank's contiguous share of n validation images: no padding, sizes differ by at most one."""
    return range(n * rank // size, n * (rank + 1) // size)
