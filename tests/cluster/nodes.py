"""Several hosts on one machine: namespaces of the kernel, each with its own name, address, processes and local disk.

    with Network(folder, ["n1", "n2"], sshd=True) as net:
        net["n1"].run("mpirun", "-H", "n1,n2", "hostname")
        net["n2"].limit("200mbit")        # the link between n2 and the switch; None: no limit
        net["n2"].cut()                   # the cable; .mend() plugs it in again
        net["n2"].kill()                  # the power: every process of n2 is gone

Files are those of this machine, as on a cluster with a shared file system. /dev/shm, /run, $TMPDIR and FOLDER/local are
each node's own. Needs root; a test that cannot have it is skipped, and what is missing is installed when a test asks,
not when it is collected. Nothing outside FOLDER changes, and everything ends with the Python that made it, even by
SIGKILL: the first process of a node reads from a pipe that only this Python holds open.
"""

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import packages
from tests.conftest import Finished, environment, run_command

SUBNET = "10.77.0"
# Each node's own, as on a cluster: Open MPI names its files after process ids, which several nodes here have in common.
TMP = {"TMPDIR": "/run/tmp"}
PROGRAMS = {
    "unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2", "ssh": "openssh-client",
    "sshd": "openssh-server",
}  # fmt: skip
KEEPER = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mkdir /run/tmp
mount -t tmpfs local "$2/local"
ip link set lo up
echo ready
read -r _ || true
"""
SWITCH = "ip link add switch type bridge; ip link set switch up; echo ready; read -r _ || true"


def obstacle() -> str | None:
    """Why there can be no nodes here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := packages.obstacle(PROGRAMS):
        return f"network namespaces: {missing}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "name", "a", "type", "veth"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no network namespaces with veth here: {tried.stderr.strip()}" if tried.returncode else None


class Node:
    """One host of a `Network`; `pid` is its first process, as this machine numbers it."""

    def __init__(self, name: str, number: int, folder: Path, switch: int) -> None:
        self.name, self.address, self.port, self.switch = name, f"{SUBNET}.{number}", f"port{number}", switch
        namespaces = ("--net", "--uts", "--mount", "--pid", "--mount-proc")
        self.keeper = _keeper(folder / f"{name}.keeper", *namespaces, script=KEEPER, words=(name, str(folder)))
        self.pid = _first_child(self.keeper.pid)
        self._switch("ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        self._switch("ip", "link", "set", self.port, "master", "switch", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def enter(self, cwd: Path | str | None = None) -> list[str]:
        """The words before a command that make it run on this node."""
        spaces = ("--net", "--uts", "--mount", "--pid")
        return ["nsenter", f"--target={self.pid}", *spaces, f"--wdns={cwd or Path.cwd()}", "--"]

    def run(self, *words: str, timeout: float = 60, cwd: Path | None = None, check: bool = True,
            **extra: str) -> Finished:  # fmt: skip
        """A command on this node, with a time-out; it must succeed unless `check=False`."""
        done = run_command([*self.enter(cwd), *words], timeout, **{**TMP, **extra})
        assert done.returncode == 0 or not check, f"{' '.join(words)} on {self.name}: {done.returncode}\n{done.stdout}"
        return done

    def start(self, *words: str, log: Path, cwd: Path | None = None, **extra: str) -> subprocess.Popen[Any]:
        """A command that goes on in the background, in its own process group, and writes to `log`."""
        with log.open("a") as out:
            return subprocess.Popen(
                [*self.enter(cwd), *words], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=environment(**{**TMP, **extra}), start_new_session=True,
            )  # fmt: skip

    def limit(self, rate: str | None) -> None:
        """Let the link carry so much in each direction, in tc's words (200mbit, 1gbit); None: as much as it can."""
        shape = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms") if rate else ("pfifo",)
        for enter, device in ((self._switch, self.port), (self.run, "eth0")):
            enter("tc", "qdisc", "replace", "dev", device, "root", *shape)

    def cut(self) -> None:
        """Take the node off the network; its processes go on."""
        self._switch("ip", "link", "set", self.port, "down")

    def mend(self) -> None:
        """Undo `cut`."""
        self._switch("ip", "link", "set", self.port, "up")

    def kill(self) -> None:
        """End every process of the node at once."""
        self.keeper.kill()
        self.keeper.wait()

    def processes(self) -> dict[int, str]:
        """{process id on this machine: command line} of what runs on the node, its first process left out."""
        own, found = _namespace(self.pid), {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid and own and _namespace(int(entry.name)) == own:
                try:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                except OSError:
                    continue
        return found

    def _switch(self, *words: str) -> None:
        run_command(["nsenter", f"--target={self.switch}", "--net", *words], 30).check_returncode()


class Network(Mapping[str, Node]):
    """Nodes by name, all on one switch, with the addresses 10.77.0.1, .2 ... in the order of `names`."""

    def __init__(self, folder: Path, names: Sequence[str], *, rate: str | None = None, sshd: bool = False) -> None:
        self.folder, self.names, self.rate, self.wants_sshd = folder, list(names), rate, sshd
        self.nodes: dict[str, Node] = {}

    def __enter__(self) -> "Network":
        if why := obstacle():
            pytest.skip(why)
        (self.folder / "local").mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{SUBNET}.{n} {name}" for n, name in enumerate(self.names, 1))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self.switch = _keeper(self.folder / "switch.keeper", "--net", script=SWITCH)
        try:
            for number, name in enumerate(self.names, 1):
                self.nodes[name] = Node(name, number, self.folder, _first_child(self.switch.pid))
                if self.rate:
                    self.nodes[name].limit(self.rate)
            if self.wants_sshd:
                self.start_sshd()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.kill()
        self.switch.kill()
        self.switch.wait()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def __iter__(self) -> Any:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def start_sshd(self) -> None:
        """`ssh NODE` works between all nodes, with keys of this network alone and the environment of our tests."""
        ssh = self.folder / "ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        for key in ("host", "user"):
            run_command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], 30).check_returncode()
        known = (*TMP, "PATH", "PYTHONPATH")
        shared = {k: v for k, v in environment(**TMP).items() if k in known or "_ALLOW_RUN_AS_ROOT" in k}
        told = " ".join(f"{k}={shlex.quote(v)}" for k, v in shared.items())
        (ssh / "sshd_config").write_text(
            f"HostKey {ssh}/host\nAuthorizedKeysFile {ssh}/user.pub\nStrictModes no\nPermitRootLogin yes\n"
            f"PasswordAuthentication no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
            # after root's own .bashrc, which may change PATH
            f'ForceCommand {told} exec bash --norc -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        (ssh / "ssh_config").write_text(
            f"Host *\n  IdentityFile {ssh}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        for node in self.values():
            node.run("mount", "--bind", str(ssh / "ssh_config"), "/etc/ssh/ssh_config")
            node.run("mkdir", "/run/sshd")
            node.start("/usr/sbin/sshd", "-D", "-e", "-f", str(ssh / "sshd_config"), log=ssh / f"{node.name}.log")
        first = next(iter(self.values()))
        for name in self:
            _until(lambda name=name: first.run("ssh", name, "true", check=False).returncode == 0, f"sshd of {name}")


def _keeper(log: Path, *namespaces: str, script: str, words: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The process that holds namespaces open; when it ends, all that runs in its pid namespace ends."""
    with log.open("w") as errors:
        keeper = subprocess.Popen(
            ["unshare", *namespaces, "--fork", "--kill-child", "bash", "-c", script, "keeper", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
    assert keeper.stdout is not None
    if keeper.stdout.readline() != "ready\n":
        keeper.kill()
        raise RuntimeError(f"no namespace {' '.join(words[:1])}: {log.read_text()}")
    return keeper


def _first_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _namespace(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except OSError:
        return None


def _until(true: Any, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
