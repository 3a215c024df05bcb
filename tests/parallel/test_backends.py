"""The same training through Horovod by MPI, Horovod by Gloo and torch.distributed, on 1, 2 and 3 real ranks."""

import pytest

pytestmark = pytest.mark.parallel
WORKER = "tests/parallel/worker_backends.py"
RUNS = [(n, c) for n in (1, 2, 3) for c in ("horovod by MPI", "horovod by gloo", "torch under torchrun")]
ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # of one number


@pytest.fixture(scope="module")
def alone(launch_once):
    return launch_once(1, WORKER, "alone")[0]


@pytest.fixture(scope="module", params=RUNS, ids=lambda p: f"{p[0]} {p[1]}")
def run(request, launch_once):
    size, carrier = request.param
    results = launch_once(size, WORKER, carrier=carrier)
    assert {r["backend"] for r in results} == {"HorovodComm" if carrier.startswith("horovod") else "TorchComm"}
    return results


@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm"])
def test_the_same_weights_and_losses_as_alone(run, alone, kind):
    for rank in run:
        got, expected = rank["trained"][kind], alone["trained"][kind]
        assert got["weights"] == pytest.approx(expected["weights"], abs=1e-10)
        assert got["losses"] == pytest.approx(expected["losses"], abs=1e-10)
        assert got["averaged"] == pytest.approx(run[0]["trained"][kind]["averaged"], rel=1e-12)


@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm"])
def test_replicas_are_equal_to_the_last_bit(run, kind):
    assert all(r["trained"][kind]["checksums"] == run[0]["trained"][kind]["checksums"] for r in run)


@pytest.mark.parametrize("wire", list(ROUNDING))
def test_what_the_wire_rounds(run, wire):
    """Each number is rounded before it is sent, and each partial sum after: at most once per rank."""
    size, unit = len(run), ROUNDING[wire]
    for rank in run:
        assert rank["sums"][wire]["sums"] == run[0]["sums"][wire]["sums"]
        assert rank["sums"][wire]["error"] <= 1.01 * size * unit
    if size > 1 and wire != "fp32":
        assert run[0]["sums"][wire]["error"] > unit / 4  # it was really sent in that format
