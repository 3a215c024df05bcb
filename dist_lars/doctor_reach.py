"""Which nodes a node can connect to: asked when the ranks of a job wait for each other and nobody knows for whom."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Interface
from typing import NamedTuple

import psutil

from dist_lars.launchers import launcher_of

CONNECT = 1.5  # seconds; between healthy nodes it takes a thousandth of that
ASKED = 16  # other hosts that each tries, the next ones in order: processes may have 1,024 files
WAITING = 4096  # connections that are never accepted: the kernel answers all the same


class Door(NamedTuple):
    """Where a rank listens: its host's addresses, as "10.0.0.1/24", and its own port."""

    host: str
    addresses: list[str]
    port: int


def host_name() -> str:
    """This node as SLURM calls it, where srun started this process, else as it calls itself."""
    own = os.environ.get("SLURMD_NODENAME") if launcher_of(os.environ) == "srun" else None
    return own or socket.gethostname()


def open_door() -> tuple[socket.socket, Door]:
    """Listen; the socket is to be kept."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(WAITING)
    return listener, Door(host_name(), addresses(os.environ.get("HOROVOD_GLOO_IFACE")), listener.getsockname()[1])


def addresses(interface: str | None) -> list[str]:
    """The IPv4 addresses of this host that others may use; only those of `interface` ("ib0,ib1") if it is named."""
    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    wanted = interface.split(",") if interface else up
    found = [
        IPv4Interface(f"{a.address}/{a.netmask}")
        for name, own in psutil.net_if_addrs().items() if name in wanted
        for a in own if a.family == socket.AF_INET
    ]  # fmt: skip
    return [str(a) for a in found if not (a.is_loopback or a.is_link_local)]


def unreached(own: Door, doors: Iterable[Door]) -> dict[str, str]:
    """{host: its address that does not answer here, or ""} of ASKED other hosts, one door of each.

    A host is tried on every network that it shares with this one, for MPI uses all of them, and where they share none
    on all of its addresses, of which one must answer. An address that both have is a bridge inside each, of containers.
    """
    here = [IPv4Interface(a) for a in own.addresses]
    others = {door.host: door for door in doors if door.host != own.host}
    next_ones = sorted(others, key=lambda host: (host < own.host, host))[:ASKED]
    tried: dict[str, dict[str, socket.socket]] = {}
    needed: dict[str, bool] = {}  # whether all must answer
    for door in (others[host] for host in next_ones):
        theirs = [a for a in map(IPv4Interface, door.addresses) if a not in here]
        near = [a for a in theirs if any(a.ip in h.network for h in here)]
        needed[door.host] = bool(near)
        tried[door.host] = {str(a.ip): _knock(a, door.port) for a in near or theirs}
    time.sleep(CONNECT)
    silent = {host: [a for a, s in sockets.items() if not _answered(s)] for host, sockets in tried.items()}
    bad = {host: bool(own) and (needed[host] or len(own) == len(tried[host])) for host, own in silent.items()}
    found = {host: own[0] if bad[host] else "" for host, own in silent.items()}
    return found | {host: "no address" for host in next_ones if own.addresses and not others[host].addresses}


def _knock(address: IPv4Interface, port: int) -> socket.socket:
    caller = socket.socket()
    caller.setblocking(False)
    caller.connect_ex((str(address.ip), port))
    return caller


def _answered(caller: socket.socket) -> bool:
    with caller:
        try:
            caller.getpeername()
        except OSError:
            return False
        return True


def cut_off(told: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """{host: its address} of the hosts that most others do not reach, by what `unreached` told on each host."""
    votes: dict[str, list[str]] = {}
    for own in told:
        for host, address in own.items():
            votes.setdefault(host, []).append(address)
    return {host: max(said) for host, said in sorted(votes.items()) if sum(map(bool, said)) > len(said) / 2}
