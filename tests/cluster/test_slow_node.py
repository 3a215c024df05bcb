"""The doctor on hosts whose network is really slow, or gone."""

import json
import re

import pytest

from tests.cluster import nodes
from tests.cluster.slurm import until
from tests.conftest import BIN

pytestmark = pytest.mark.cluster


def examined(tmp_path, *options):
    """The examination of three ranks on hosts a, b and c."""
    return [
        f"{BIN}/mpirun", "-np", "3", "-H", "a,b,c", "--bind-to", "none", "-x", "PATH", "-x", "PYTHONPATH",
        "python", "-m", "dist_lars.doctor", "--cluster", "--preset", "quickstart", "--device", "cpu",
        "--run_dir", str(tmp_path / "run"), *options,
    ]  # fmt: skip


def test_a_node_with_a_slow_link_is_named(tmp_path):
    with nodes.Network(tmp_path, ["a", "b", "c"], sshd=True) as net:
        net["b"].limit("100mbit")
        done = net["a"].run(*examined(tmp_path), cwd=tmp_path, check=False, timeout=150)
    assert re.search(r"^FAIL +links +b is slow to both of its neighbours", done.stdout, re.M), done.stdout
    assert "sbatch --exclude=b" in done.stdout
    assert done.returncode == 3


def test_a_node_without_network_is_named(tmp_path):
    """It sees the shared files and answers there, as a node does whose fast network alone is down."""
    with nodes.Network(tmp_path, ["a", "b", "c"], sshd=True) as net:
        net["a"].start(*examined(tmp_path, "--limit", "25"), log=tmp_path / "log", cwd=tmp_path)
        until(lambda: len(list((tmp_path / "run/preflight").rglob("rank*"))) == 3, "three ranks")
        net["b"].cut()
        until((tmp_path / "run/preflight.json").exists, "a verdict", 60)
    (check,) = json.loads((tmp_path / "run/preflight.json").read_text())
    assert re.search(r"no connection from the other nodes to b \(10\.77\.0\.2\)", check["value"]), check
    assert "--exclude=b" in check["fix"]
