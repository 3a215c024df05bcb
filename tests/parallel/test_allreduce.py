"""Real all-reduces by each way to launch Horovod, on 1, 2 and 3 ranks."""

import pytest

LAUNCHERS = {"horovodrun": "mpi", "gloo": "gloo", "mpirun": "mpi"}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_allreduce(launch, launcher, size):
    ranks = launch(size, "tests/parallel/allreduce_worker.py", launcher=launcher)
    total = size * (size + 1) / 2
    expected = {
        "size": size,
        "controller": LAUNCHERS[launcher],
        "small": [total, 10 * (total - size)],
        "large": [total / size, 299_999 * total / size],
        "many": [size * i + total - size for i in range(50)],
        "word": f"from {size - 1}",
    }
    assert ranks == [expected] * size
