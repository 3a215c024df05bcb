"""The doctor on hosts whose network is really slow."""

import re

import pytest

from tests.cluster import nodes
from tests.conftest import BIN

pytestmark = pytest.mark.cluster


def test_a_node_with_a_slow_link_is_named(tmp_path):
    with nodes.Network(tmp_path, ["a", "b", "c"], sshd=True) as net:
        net["b"].limit("100mbit")
        done = net["a"].run(
            f"{BIN}/mpirun", "-np", "3", "-H", "a,b,c", "--bind-to", "none", "-x", "PATH", "-x", "PYTHONPATH",
            "python", "-m", "dist_lars.doctor", "--cluster", "--preset", "quickstart", "--device", "cpu",
            "--run_dir", str(tmp_path / "run"), cwd=tmp_path, check=False, timeout=150,
        )  # fmt: skip
    assert re.search(r"^FAIL +links +b is slow to both of its neighbours", done.stdout, re.M), done.stdout
    assert "sbatch --exclude=b" in done.stdout
    assert done.returncode == 3
