"""A SLURM of our own: munged, slurmctld and one slurmd per node of a `Network`, from Debian's packages.

Nothing under /etc is touched, and every daemon runs on a node, so it ends with it.
"""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster import nodes, packages
from tests.conftest import ROOT

PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib")
PROGRAMS = {
    "slurmd": "slurmd", "slurmctld": "slurmctld", "sbatch": "slurm-client", "munged": "munge",
    str(PMIX / "libpmix.so.2"): "libpmix2",
}  # fmt: skip
CONF = """
ClusterName=test
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldHost=login({login})
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# PMIx keeps its sockets there, under the same name on every node.
TmpFS={folder}/local
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# The nodes say that they have 32 processors and 4 GPUs, as the templates want.
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=120
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
NodeName=n1 NodeAddr={n1} CPUs=32 RealMemory=1000 Gres=gpu:4
NodeName=n2 NodeAddr={n2} CPUs=32 RealMemory=1000 Gres=gpu:4
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
# Its jobs take the nodes from those of the other.
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 MaxTime=INFINITE State=UP
# For --test-only: nodes that exist on paper.
NodeName=paper[1-16] CPUs=32 RealMemory=1000 Gres=gpu:4 State=CLOUD
PartitionName=paper Nodes=paper[1-16] MaxTime=INFINITE State=UP
SuspendTime=INFINITE
SuspendProgram=/bin/true
ResumeProgram=/bin/true
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
PATIENCE = 300  # seconds for what takes ten on an idle machine: a job that hangs is found all the same


def obstacle() -> str | None:
    """Why there can be no SLURM here; None where there can, after installing what was missing."""
    if found := nodes.obstacle():
        return found
    found = packages.obstacle(PROGRAMS)
    return f"SLURM: {found}" if found else None


@dataclass
class Slurm:
    """A running cluster of a login node and two compute nodes, n1 and n2; `work` is where jobs are submitted."""

    net: nodes.Network
    folder: Path
    work: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Bring everything up; returns when both nodes are idle."""
        for name in ("state", "devices", "pmix"):
            (self.folder / name).mkdir()
        for n in range(4):  # SLURM wants device files; these are /dev/null under another name
            os.mknod(self.folder / f"devices/gpu{n}", 0o020666, os.makedev(1, 3))
        (self.folder / "key").write_bytes(os.urandom(1024))
        (self.folder / "key").chmod(0o400)
        addresses = {name: node.address for name, node in self.net.items()}
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, **addresses))
        gres = f"NodeName=n[1-2],paper[1-16] Name=gpu File={self.folder}/devices/gpu[0-3]\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # idle, where v2 would ask systemd
        self._show_pmix()
        self._daemon(
            "login", "munged", "--foreground", "--force", f"--key-file={self.folder}/key",
            f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        until((self.folder / "munge.socket").exists, "munged")
        self._daemon("login", "slurmctld", "-D", "-c")
        for name in ("n1", "n2"):
            self._daemon(name, "slurmd", "-D", "-N", name)
        until(lambda: self._idle() == ["n1", "n2"], "slurmd")

    def _idle(self) -> list[str]:
        return self.on("sinfo", "-h", "-N", "-p", "test", "-t", "idle", "-o", "%N", check=False).split()

    def _show_pmix(self) -> None:
        """SLURM's PMIx plugin opens libpmix.so, a name that only libpmix-dev brings: add it, for the nodes alone."""
        shutil.copytree(PMIX, self.folder / "pmix", symlinks=True, dirs_exist_ok=True)
        if not (self.folder / "pmix/libpmix.so").exists():
            (self.folder / "pmix/libpmix.so").symlink_to("libpmix.so.2")
        for node in self.net.values():
            node.run("mount", "--bind", str(self.folder / "pmix"), str(PMIX))

    def _daemon(self, name: str, program: str, *words: str) -> None:
        path = shutil.which(program, path=packages.PATH)
        assert path
        log = self.folder / f"{program}.{name}.out"
        self.net[name].start(path, *words, log=log, SLURM_CONF=str(self.folder / "slurm.conf"))

    def lose(self, name: str) -> None:
        """A node dies, and comes back with nothing on it; SLURM, which finds out after SlurmdTimeout, is told."""
        self.on("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

        def dead() -> bool:
            left = [pid for pid, line in self.net[name].processes().items() if line and "sshd" not in line]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        until(dead, f"the end of all processes on {name}")
        # as on a node without a disk: over the files of a job's first start PMIx stumbles in its next
        self.net[name].run("find", f"{self.folder}/spool.{name}", f"{self.folder}/local", "-mindepth", "1", "-delete")
        self._daemon(name, "slurmd", "-D", "-N", name)

    def story(self, job: str) -> str:
        """What slurmctld and the compute nodes wrote about a job and about nodes, the last of it."""
        about = re.compile(rf"(job|JobId|StepId)[= ]{job}\b|\[{job}\.|\({job}\)|node n[12]", re.IGNORECASE)
        told = []
        for name in ("slurmctld", "slurmd.n1", "slurmd.n2"):
            lines = (self.folder / f"{name}.log").read_text().splitlines()
            told += [f"{name}: {line}" for line in lines if about.search(line)][-12:]
        return "\n".join(told)

    def on(self, *words: str, check: bool = True, **extra: str) -> str:
        """The output of a command on the login node."""
        told = {"SLURM_CONF": str(self.folder / "slurm.conf"), **self.environment, **extra}
        return self.net["login"].run(*words, cwd=self.work, check=check, **told).stdout

    def submit(self, template: str, *options: str, run: tuple[str, ...] = (), **extra: str) -> "Job":
        """`sbatch OPTIONS slurm/TEMPLATE.sbatch RUN...` in the work folder, with more environment variables."""
        said = self.on("sbatch", "--parsable", *options, f"slurm/{template}.sbatch", *run, **extra)
        return Job(self, said.split()[-1])

    def steps(self) -> list[str]:
        """The steps of jobs that are still on the compute nodes."""
        found = {**self.net["n1"].processes(), **self.net["n2"].processes()}
        return [line for line in found.values() if line.startswith("slurmstepd")]

    def leftovers(self) -> dict[int, str]:
        """Processes on the compute nodes that are neither daemons nor of a running job."""
        found = {**self.net["n1"].processes(), **self.net["n2"].processes()}
        return {pid: line for pid, line in found.items() if line and not re.search(r"slurmd|slurmstepd|sshd", line)}


@dataclass
class Job:
    """A job, or one task of an array job, by its number."""

    slurm: Slurm
    number: str

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` tells."""
        shown = self.slurm.on("scontrol", "show", "job", self.number, "--oneliner")
        return dict(re.findall(r"(\w+)=(\S*)", shown.splitlines()[0]))

    def log(self) -> str:
        """What the job has written so far."""
        path = Path(self.facts()["StdOut"])
        return path.read_text() if path.exists() else ""

    def until(self, true: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Wait until something holds; the job's log is shown when it does not come."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                why = f"{what}: not within {seconds:g} s; {self.what_happened()}"
                self.slurm.on("scancel", self.number, check=False)
                pytest.fail(why)
            time.sleep(0.3)

    def end(self, seconds: float = PATIENCE) -> str:
        """Its last state."""
        self.until(lambda: self.facts()["JobState"] in ENDED, "the end of the job", seconds)
        return self.facts()["JobState"]

    def completes(self, seconds: float = PATIENCE) -> str:
        """Its log, after an end as it should be."""
        assert self.end(seconds) == "COMPLETED", self.what_happened()
        return self.log()

    def what_happened(self) -> str:
        """For the message of a test that fails: the job's log, and what SLURM says; its state at the end."""
        facts = self.facts()
        told = ", ".join(f"{name}={facts.get(name)}" for name in ("JobState", "Reason", "Restarts", "ExitCode"))
        return f"\n{self.log()[-5000:]}\n{self.slurm.story(facts['JobId'])}\n{told}"

    def _steps(self) -> str:
        """Its steps that slurmctld knows of."""
        return self.slurm.on("squeue", "--noheader", "--steps", f"--jobs={self.number}", check=False).strip()

    def restart(self, seconds: float = PATIENCE) -> None:
        """Wait until it was requeued, and let it start soon: SLURM waits for two minutes."""
        self.until(lambda: self.facts()["Restarts"] != "0", "requeue", seconds)
        # its steps will have the numbers of the first start, which must have gone from the nodes
        self.until(lambda: not self.slurm.steps(), "the end of the first start", seconds)
        # and from the records of slurmctld, which else has no place for the next ("Requested nodes are busy")
        self.until(lambda: self.facts()["JobState"] == "PENDING" and not self._steps(), "the queue again", seconds)
        # in a later second, or slurmd takes it for the one that ended ("Job credential revoked");
        # and no second warning: this start has ten minutes
        self.slurm.on("scontrol", "update", f"JobId={self.number}", "StartTime=now+2", "TimeLimit=10")


def until(true: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def work_folder(folder: Path) -> Path:
    """A folder to submit from: the templates of this clone without its site.sh."""
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.sh"))
    return folder
