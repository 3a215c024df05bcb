"""Real all-reduces by each way to launch Horovod, on 1, 2 and 3 ranks."""

import pytest

pytestmark = pytest.mark.parallel


def check(ranks, controller):
    size = len(ranks)
    total = size * (size + 1) / 2
    expected = {
        "size": size,
        "controller": controller,
        "small": [total, 10 * (total - size)],
        "large": [total / size, 299_999 * total / size],
        "many": [size * i + total - size for i in range(50)],
        "word": f"from {size - 1}",
    }
    assert ranks == [expected] * size


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("carrier", "controller"), [("horovod by MPI", "mpi"), ("horovod by gloo", "gloo")])
def test_allreduce(shared, carrier, controller, size):
    check([rank["horovod"] for rank in shared(size, carrier)], controller)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_allreduce_under_horovodrun(launch, size):
    check(launch(size, "tests/parallel/worker_allreduce.py", launcher="horovodrun"), "mpi")
