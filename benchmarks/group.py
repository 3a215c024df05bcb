"""Groups of real ranks that live side by side and take turns, so that a disturbed machine disturbs all of them.

A group is one job of `benchmarks.worker`, started by the launcher at hand. Its ranks connect back to this process and
wait for what to do; those that wait are stopped by a signal where they run on this host, for Horovod's background
threads never rest. Nothing of a group outlives this process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent  # not resolved: the environment's own bin, where mpirun and horovodrun lie
SECONDS = 300.0  # for a group to start
GREETING = 10  # seconds for one who connects to show that it is a rank
PATIENCE = 1800.0  # for an answer: many passes of a large network on a CPU; who ends is noticed at once
ANY = 10**6  # ranks
LEAST = 6  # rounds: the bootstrap of fewer medians is an interval of one or two values
PASSED = re.compile("(HOROVOD_|NCCL_|OMP_|MALLOC_|GLIBC_TUNABLES|DIST_LARS_|LD_LIBRARY_PATH$)")


class GroupFailed(RuntimeError):
    """A group ended or went silent; the text ends with what it said."""


def start_words(launcher: str, ranks: int, names: Iterable[str] = (), hosts: str = "") -> list[str]:
    """What starts `ranks` copies of the command that follows; the named variables reach them on every host.

    `hosts`, as in "host1:4,host2:4", are filled from the first on by mpirun and horovodrun; srun has its allocation.
    """
    if launcher == "srun":
        if hosts:
            raise SystemExit("--hosts is for mpirun and horovodrun; srun takes the hosts of its allocation")
        per_node = min(ranks, slots(launcher))
        return ["srun", "--overlap", f"--nodes={-(-ranks // per_node)}", f"--ntasks={ranks}",
                f"--ntasks-per-node={per_node}", f"--mpi={os.environ.get('MPI_TYPE', 'pmix')}", "--gpu-bind=none",
                "--kill-on-bad-exit=1"]  # fmt: skip
    passed = ["PATH", "PYTHONPATH", "OMP_NUM_THREADS", *names, *(name for name in os.environ if PASSED.match(name))]
    passed = [word for name in dict.fromkeys(passed) for word in ("-x", name)]
    words = {
        "mpirun": [_own("mpirun"), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", *passed, "-np"],
        "horovodrun": [_own("horovodrun"), "-np"],
        "gloo": [_own("horovodrun"), "--gloo", "-np"],
    }
    return [*words[launcher], str(ranks), *(["-H", hosts] if hosts else [])]


def slots(launcher: str, hosts: str = "") -> int:
    """How many ranks of a group one host holds at most; without hosts to choose from, this one holds them all."""
    if launcher == "srun":  # e.g. 4(x2),3
        told = os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
        return int(re.match("[0-9]*", told)[0] or ANY)  # type: ignore[index]
    return max(int(host.partition(":")[2] or 1) for host in hosts.split(",")) if hosts else ANY


def described(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a record tells of a rank: where it computes, how, and with which variables."""
    names = {
        "device": "device", "device_name": "device_name", "computes_in": "computes_in", "threads": "threads_per_rank",
        "workers": "workers_per_rank", "environment": "environment_of_ranks",
    }  # fmt: skip
    return {label: facts[name] for name, label in names.items() if name in facts}


def _own(name: str) -> str:
    return str(BIN / name) if (BIN / name).exists() else name


def launcher_at_hand() -> str:
    """srun inside an allocation, else mpirun."""
    return "srun" if os.environ.get("SLURM_JOB_ID") and shutil.which("srun") else "mpirun"


def count(text: str) -> int:
    """A whole number from 1 on, of a command line: none of anything would be noticed late, or measure nothing."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def option(text: str) -> str:
    """KEY=VALUE of a command line, as it is."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return text


def launch_options(parser: argparse.ArgumentParser) -> None:
    """How a benchmark that starts ranks is told by what, and where."""
    parser.add_argument("--launcher", choices=("mpirun", "horovodrun", "srun"), default=launcher_at_hand())
    parser.add_argument(
        "--hosts", default="", help="host1:4,host2:4, this one first, for mpirun and horovodrun over ssh"
    )


def environment(**extra: str) -> dict[str, str]:
    """What the ranks see: the environment's programs first, this source tree, and one thread each unless told."""
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{BIN}:{env.get('PATH', '')}"
    if os.geteuid() == 0:  # Open MPI refuses root without these
        env |= {f"{who}_ALLOW_RUN_AS_ROOT{what}": "1" for who in ("OMPI", "PRTE") for what in ("", "_CONFIRM")}
    return env | extra


class Group:
    """`ranks` processes that run `job`, a dictionary for `benchmarks.worker`."""

    def __init__(self, job: Mapping[str, Any], ranks: int, launcher: str, hosts: str = "", **extra: str) -> None:
        self.ranks = ranks
        self.output: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the group
        key = secrets.token_hex(16)
        own = "" if hosts or "SLURM_JOB_ID" in os.environ else "127.0.0.1"
        with Listener((own, 0), backlog=ranks) as listener:
            port = listener.address[1]
            where = own or socket.gethostname()
            told = {"BENCHMARK_HOST": where, "BENCHMARK_PORT": str(port), "BENCHMARK_KEY": key, **extra}
            self.words = start_words(launcher, ranks, told, hosts)
            self.process = subprocess.Popen(
                [*self.words, sys.executable, "-m", "benchmarks.worker", json.dumps(dict(job))],
                env=environment(**told), stdout=self.output, stderr=subprocess.STDOUT, cwd=ROOT,
                preexec_fn=die_with_parent,
            )  # fmt: skip
            self.connections: dict[Any, Connection] = {}
            while len(self.connections) < ranks:
                rank, connection = self._accept(listener, key.encode())
                self.connections[rank] = connection
        self.facts = self._gather(SECONDS)
        here = socket.gethostname()
        self.local = [f["pid"] for f in self.facts if f["host"] == here] if len(self.hosts()) == 1 else []
        self._signal(signal.SIGSTOP)

    def hosts(self) -> list[int]:
        """How many ranks run on each host."""
        names = [f["host"] for f in self.facts]
        return [names.count(name) for name in dict.fromkeys(names)]

    def machines(self) -> list[dict[str, Any]]:
        """What each host is, as its first rank tells, in the order of `hosts`."""
        names = [f["host"] for f in self.facts]
        return [self.facts[names.index(name)]["machine"] for name in dict.fromkeys(names)]

    def do(self, work: Any) -> list[Any]:
        """Let all ranks do `work`; their answers in order of rank."""
        self._signal(signal.SIGCONT)
        try:
            for connection in self.connections.values():
                connection.send(work)
            return self._gather(PATIENCE)
        except (EOFError, OSError) as e:
            raise self._failed("lost a rank") from e
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the ranks."""
        self._signal(signal.SIGCONT)
        for connection in self.connections.values():
            try:
                connection.send(None)
            except OSError:
                continue  # it has gone already
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.output.close()

    def _accept(self, listener: Listener, key: bytes) -> tuple[int, Connection]:
        """The next rank and its connection; whoever else finds the port is sent away."""
        listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]  Listener has no public time-out
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                connection = listener.accept()
            except TimeoutError:
                if self.process.poll() is not None:
                    raise self._failed(f"ended with {self.process.returncode} at the start") from None
                continue
            try:
                return greet(connection, key), connection
            except (AuthenticationError, EOFError, OSError):
                connection.close()
        raise self._failed(f"did not start within {SECONDS:.0f} s")

    def _gather(self, seconds: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < self.ranks:
            ready = wait([c for r, c in self.connections.items() if r not in answers], timeout=seconds)
            if not ready:
                raise self._failed(f"said nothing for {seconds:.0f} s")
            for rank, connection in self.connections.items():
                if connection in ready:
                    try:
                        answers[rank] = connection.recv()
                    except (EOFError, OSError) as e:
                        raise self._failed(f"lost rank {rank}") from e
        return [answers[rank] for rank in sorted(answers)]

    def _signal(self, number: int) -> None:
        for pid in getattr(self, "local", []):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _failed(self, what: str) -> GroupFailed:
        self._signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.output.seek(0)
        return GroupFailed(f"{' '.join(self.words)}: {what}\n{self.output.read()[-3000:]}")


def greet(connection: Connection, key: bytes) -> int:
    """The rank at the other end, once it has shown that it knows the key; an error after `GREETING` s without words.

    As Listener does with `authkey`, which would wait for ever.
    """

    def patience(seconds: int) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))

    patience(GREETING)
    deliver_challenge(connection, key)
    answer_challenge(connection, key)
    rank = connection.recv()
    patience(0)
    return rank


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent has gone, even while it is stopped."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def in_turn(
    groups: Mapping[str, Group], work: Callable[[str], Any], rounds: int, done: Callable[[str, list[Any]], None],
    enough: Callable[[], bool],
) -> int:  # fmt: skip
    """Give every group its work, round by round, until `enough()` but for `LEAST` rounds; how many rounds there were.

    `rounds` are the most, even below `LEAST`.

    Each round begins with another group: the first one would pay for what the machine did in between, or be spared it.
    """
    names = list(groups)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            done(name, groups[name].do(work(name)))
        if turn + 1 >= LEAST and enough():
            return turn + 1
    return rounds


def close_all(groups: Sequence[Group]) -> None:
    """End all groups, also after an error of one, which is raised in the end."""
    failed = []
    for group in groups:
        try:
            group.close()
        except Exception as e:  # the others hold memory and cores
            failed.append(e)
    if failed:
        raise failed[0]
