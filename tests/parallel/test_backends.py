"""The same training through Horovod by MPI, Horovod by Gloo and torch.distributed, on 1 to 4 real ranks."""

import pytest

pytestmark = pytest.mark.parallel
ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # of one number


@pytest.fixture
def run(everywhere):
    return everywhere[1]


@pytest.fixture(scope="module")
def alone(shared):
    return shared(1)[0]


@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm"])
def test_the_same_weights_and_losses_as_alone(run, alone, kind):
    for rank in run:
        got, expected = rank["training"][kind], alone["training"][kind]
        assert got["weights"] == pytest.approx(expected["weights"], abs=1e-10)
        assert got["losses"] == pytest.approx(expected["losses"], abs=1e-10)
        assert got["averaged"] == pytest.approx(run[0]["training"][kind]["averaged"], rel=1e-12)


@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm"])
def test_replicas_are_equal_to_the_last_bit(run, kind):
    assert all(r["training"][kind]["checksums"] == run[0]["training"][kind]["checksums"] for r in run)


@pytest.mark.parametrize("wire", list(ROUNDING))
def test_what_the_wire_rounds(run, wire):
    """Each number is rounded before it is sent, and each partial sum after: at most once per rank."""
    size, unit = len(run), ROUNDING[wire]
    for rank in run:
        assert rank["sums"][wire]["sums"] == run[0]["sums"][wire]["sums"]
        assert rank["sums"][wire]["error"] <= 1.01 * size * unit
    if size > 1 and wire != "fp32":
        assert run[0]["sums"][wire]["error"] > unit / 4  # it was really sent in that format


def test_the_ddp_that_we_are_measured_against_gives_our_gradients(everywhere):
    """And nothing of our reducer is left in its backward, which would slow it down."""
    carrier, run = everywhere
    for rank in run:
        if not carrier.startswith("torch") or len(run) == 1:
            assert "ddp" not in rank["sums"]
            continue
        assert rank["sums"]["ddp"]["difference"] < 1e-12 < rank["sums"]["ddp"]["size"]
        assert rank["sums"]["ddp"]["hooks"] == 0
