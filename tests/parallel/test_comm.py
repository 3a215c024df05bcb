"""The collectives and what is built on them, on 1 to 4 real ranks, under each launcher."""

import socket

import pytest

pytestmark = pytest.mark.parallel


@pytest.fixture
def run(everywhere):
    carrier, results = everywhere
    assert {r["backend"] for r in results} == {"HorovodComm" if carrier.startswith("horovod") else "TorchComm"}
    return [r["comm"] for r in results]


def test_sizes_and_collectives(run):
    n = len(run)
    for r, got in enumerate(run):
        assert got["size"] == n
        assert got["local"] == [r, n]
        assert got["sum"] == {"exact": n * 2**40 + n * (n - 1) / 2, "half": n / 2}
        assert got["average"] == pytest.approx([i + (n - 1) / 2 for i in range(4)])
        assert got["broadcast"] == [1.0] * 8
        assert got["object"] == {"from": 0}
        assert got["gather"] == [i * i for i in range(n)]
        assert got["first"] == "rank 0"


def test_refusals_reach_every_rank(run):
    last = f" (on rank {len(run) - 1}, {socket.gethostname()})" * (len(run) > 1)
    for r, got in enumerate(run):
        assert got["every"] == r
        assert got["alone"] == f"AgreedError: only the last rank looked{last}"
        assert got["alike"] == "AgreedError: only rank 0 looked"
        assert got["refused"] == "AgreedError: only rank 0 looked"
        assert got["same"] == "none"
        if len(run) > 1:
            others = ", ".join(str(r) for r in range(1, len(run)))
            assert got["differs"].startswith(f"AgreedError: the configuration of rank {others} differs from rank 0's")
            assert "'x: 0' on rank 0, 'x: 1' on rank 1" in got["differs"]


@pytest.mark.parametrize("n", ["10", "11", "13"])
def test_evaluation_counts_every_image_once(run, n):
    hits = sum(1 for i in range(int(n)) if i % 3)
    for got in run:
        scores = got["evaluation"][n]
        assert scores["count"] == int(n)
        assert scores["top1"] == pytest.approx(100 * hits / int(n))


def test_missing_images_are_an_error(run):
    assert all("evaluation saw 0 images instead of 5" in got["short"] for got in run)


def test_horovods_wrapper_keeps_every_option(everywhere, run):
    carrier, _ = everywhere
    for got in run:
        if carrier.startswith("torch"):
            assert "wrapped" not in got
            continue
        before, after = got["wrapped"]
        assert before == after
        assert before[0]["trust_coefficient"] == 0.02
