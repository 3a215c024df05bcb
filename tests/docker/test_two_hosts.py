"""docker/compose.yaml, carried out: two containers with names and addresses of their own train together over ssh."""

import os
import shlex
import time

import pytest
import yaml

from dist_lars import runlog
from tests.cluster import nodes, packages
from tests.conftest import ROOT
from tests.docker import engines

pytestmark = pytest.mark.docker
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def test_compose_itself_reads_the_file():
    """Debian's Compose needs no engine for that."""
    if reason := packages.obstacle({"docker-compose": "docker-compose"}):
        pytest.skip(reason)
    read = yaml.safe_load(engines.call("docker-compose", "-f", "docker/compose.yaml", "config").stdout)
    assert {name: service["hostname"] for name, service in read["services"].items()} == {n: n for n in read["services"]}
    assert read["services"]["node1"]["depends_on"] == {"node2": {"condition": "service_healthy"}}
    assert {tuple(service["volumes"]) for service in read["services"].values()} == {("home:/home/lars:rw",)}


def test_compose_brings_two_hosts_together(engine, tmp_path):
    if isinstance(engine, engines.Client):
        compose = (engine.program, "compose", "-f", "docker/compose.yaml")
        try:
            done = engines.call(*compose, "up", "--build", "--exit-code-from", "node1", timeout=600, check=False)
        finally:
            engines.call(*compose, "down", "--volumes", check=False)
        assert done.returncode == 0, done.stdout[-5000:]
        assert "finished: top-1" in done.stdout
        return
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 10000, 10000)
    output = without_an_engine(engine, tmp_path, home)
    assert "finished: top-1" in output, output[-5000:]
    (run,) = (home / "runs").iterdir()
    assert runlog.read(run, "start")[0]["hosts"] == ["node1", "node2"]
    keys = [path for path in (home / ".ssh").iterdir() if "PRIVATE KEY" in path.read_text()]
    assert {path.name for path in keys} == {"host", "id_ed25519"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys)


def without_an_engine(engine, folder, home) -> str:
    """What `docker compose up --exit-code-from node1` would do, by buildah and network namespaces; node1's output."""
    services = COMPOSE["services"]
    with nodes.Network(folder / "net", list(services)) as net:
        mounts = {str(home): services["node1"]["volumes"][0].split(":")[1], str(folder / "net/hosts"): "/etc/hosts"}
        inside = {name: engine.start_words(engine.container(name), None, mounts, {}) for name in services}
        for name, service in services.items():
            if name != "node1":
                words = shlex.split(service["command"])
                net[name].start(*inside[name], *words, log=folder / f"{name}.log", cwd=ROOT)
                probe = service["healthcheck"]["test"][1:]
                end = time.monotonic() + 180
                while net[name].run(*inside[name], *probe, check=False).returncode:
                    assert time.monotonic() < end, (folder / f"{name}.log").read_text()
                    time.sleep(0.5)
        # Each host takes all cores of this machine for its own: a small network, so that they need not.
        words = shlex.split(f"{services['node1']['command']} --epochs 1 --model.name cnn_small")
        done = net["node1"].run(*inside["node1"], *words, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + "".join(p.read_text() for p in folder.glob("*.log"))
    return done.stdout
