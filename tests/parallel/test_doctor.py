"""`doctor --cluster` on real ranks: what is wrong with one of them is found, named, and told in time."""

import json
import re
import time

import pytest

from dist_lars.data.folder import index_folder
from dist_lars.data.packing import Options, pack
from tests.conftest import MPIRUN, ROOT

pytestmark = pytest.mark.parallel
WORKER = str(ROOT / "tests/parallel/worker_doctor.py")


@pytest.fixture
def examine(command, tmp_path, image_folder):
    """`examine("clock", 1)` -> (exit code, output, {check: [status, value and repair]} of preflight.json)."""

    for part in ("train", "val"):
        index = index_folder(str(image_folder / part))
        pack(index, str(tmp_path / "packed" / part), Options(None, 90, 1), 1, lambda n: None)

    def run(fault, sick, np=2):
        words = (*MPIRUN, "-np", str(np), "python", WORKER, fault, str(sick), str(tmp_path / "run"))
        done = command(*words, timeout=150, DIST_LARS_DATA=str(tmp_path / "packed"))
        verdict = tmp_path / "run/preflight.json"
        checks = json.loads(verdict.read_text()) if verdict.exists() else []
        return done.returncode, done.stdout, {c["name"]: [c["status"], f"{c['value']} -> {c['fix']}"] for c in checks}

    return run


def test_three_equal_nodes_pass(examine, tmp_path):
    code, output, checks = examine("none", 0, np=3)
    assert code == 0, output
    assert len(checks) == 11
    assert not [c for c in checks.values() if c[0] == "FAIL"]
    assert re.search(r"^node2 +2 +1 x cpu", output, re.M)
    assert "3 nodes in a ring" in checks["links"][1]
    assert not (tmp_path / "run/preflight").exists()


def test_every_difference_of_a_node_is_named(examine):
    """All of them at once, so that one launch is enough, and nothing else."""
    code, output, checks = examine("version,clock,shared,stage", 1)
    assert code == 3, output
    expected = {
        "versions": r"torch is 2\S+ on node0; 1\.0 on node1 -> one environment",
        "clocks": r"that of node(1 is \+|0 is -)(45|90)\.0 s off",
        "run directory":
            r"files of rank 0 are not visible on node1 -> a --run_dir \(RUN_DIR of the templates\) on a file system",
        "scratch": r"staging /proc/none: No such file",
    }  # fmt: skip
    assert {name for name, c in checks.items() if c[0] == "FAIL"} == set(expected), checks
    for name, words in expected.items():
        assert re.search(words, checks[name][1]), checks[name]


def test_a_rank_that_raises_is_named_at_once(examine):
    began = time.monotonic()
    code, output, checks = examine("raise", 1)
    assert time.monotonic() - began < 75  # when the others would say that they waited
    assert code != 0
    assert "rank 1 on" in output
    assert "failed while looking around: OSError: this disk is gone" in checks["progress"][1]


@pytest.mark.faults
def test_a_slow_import_is_no_fault(examine, tmp_path):
    """Another launcher would not help, more time may: the file says so, for launchers change exit codes."""
    code, output, checks = examine("import", 1)
    assert code != 0
    assert re.search(r"rank 1 still is importing torch on \S+: the environment lies on a slow file system", output)
    assert not checks
    assert (tmp_path / "run/preflight/importing").exists()


@pytest.mark.faults
@pytest.mark.parametrize("sick", [0, 1])
def test_a_rank_that_hangs_is_named_in_time(examine, sick):
    code, output, checks = examine("stop", sick)
    assert code != 0
    assert re.search(rf"rank {1 - sick} on \S+ waited 5 s while", output), (code, output)
    assert f"rank {sick} on" in checks["progress"][1]
    assert "stands at 'looking around' and answers no more" in checks["progress"][1]
    assert "sbatch --exclude=" in checks["progress"][1]
