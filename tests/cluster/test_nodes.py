"""The nodes that the cluster tests stand on: separate hosts in name, address, processes, memory and disk."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import nodes
from tests.conftest import BIN, ROOT, environment

pytestmark = pytest.mark.cluster
TALK = """
import socket, sys, time
if sys.argv[1] == "listen":
    server = socket.create_server(("", 9999))
    while True:
        peer, _ = server.accept()
        while peer.recv(1 << 20): pass
        peer.sendall(b"k"); peer.close()
peer = socket.create_connection((sys.argv[1], 9999), timeout=5)
began = time.monotonic()
peer.sendall(bytes(int(sys.argv[2]))); peer.shutdown(socket.SHUT_WR); peer.recv(1)
print(time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with nodes.Network(tmp_path_factory.mktemp("net"), ["n1", "n2"]) as network:
        network["n2"].start(sys.executable, "-c", TALK, "listen", log=network.folder / "talk.log")
        time.sleep(0.5)
        yield network


def send(net, size):
    """Seconds that so many bytes take from n1 to n2, None when n2 cannot be reached; the shortest of three tries."""
    tries = [net["n1"].run(sys.executable, "-c", TALK, "n2", str(size), check=False) for _ in range(3)]
    return min((float(done.stdout) for done in tries if done.returncode == 0), default=None)


def test_a_node_has_its_own_name_memory_and_disk(net):
    assert net["n1"].run("hostname").stdout == "n1\n"
    for place in ("/dev/shm", "/run", str(net.folder / "local")):
        net["n1"].run("touch", f"{place}/of-n1")
        assert net["n2"].run("test", "-e", f"{place}/of-n1", check=False).returncode == 1
        assert not Path(place, "of-n1").exists()
    assert net["n1"].run("pwd", cwd=net.folder).stdout == f"{net.folder}\n"


def test_the_link_carries_what_it_may(net):
    net["n2"].limit("80mbit")
    assert 0.4 < send(net, 5_000_000) < 1.5
    net["n2"].limit(None)
    assert send(net, 5_000_000) < 0.3


def test_a_node_that_is_cut_off_goes_on_alone(net):
    net["n2"].cut()
    assert send(net, 10) is None
    assert any("listen" in line for line in net["n2"].processes().values())
    net["n2"].mend()
    assert send(net, 10) < 5


def test_sshd_and_the_power_switch(tmp_path):
    with nodes.Network(tmp_path, ["a", "b"], sshd=True) as net:
        assert net["a"].run("ssh", "b", "hostname; command -v python").stdout == f"b\n{BIN}/python\n"
        sleeper = net["b"].start("sleep", "100", log=tmp_path / "sleep.log")
        net["b"].kill()
        assert sleeper.wait(60) != 0
        assert not net["b"].processes()
        assert net["a"].run("hostname").stdout == "a\n"


def test_nodes_end_with_the_python_that_made_them_however_it_ends(net, tmp_path):
    program = (
        "import sys, time, pathlib\nfrom tests.cluster.nodes import Network\n"
        f"with Network(pathlib.Path({str(tmp_path)!r}), ['n1']) as net:\n"
        f"    net['n1'].start('sleep', '4321', log=pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "    print(net['n1'].pid, flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT}/tests"),
    )
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
