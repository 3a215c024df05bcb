"""Two hosts with a network between them: they train as one would, and when one is lost the job ends and can go on."""

import json
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest

from dist_lars import checkpoint, runlog
from dist_lars.models.small import cnn_small
from tests.cluster import nodes
from tests.conftest import ROOT, run_command
from tests.faults.conftest import EPOCHS, STEPS, Job, fault_images  # noqa: F401 -- a fixture
from tests.faults.test_faults import same

pytestmark = pytest.mark.hosts
NAMES = ["host1", "host2"]
EXPORTS = [word for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "FAULT_PHASES") for word in ("-x", name)]
WAYS = {
    "mpirun": ["mpirun", "--bind-to", "none", *EXPORTS],
    "horovodrun": ["horovodrun", "--disable-cache"],
    "gloo": ["horovodrun", "--disable-cache", "--gloo"],
}
LAUNCHING = {
    # As README.md says, only faster: without it mpirun waits for ever for a host that is cut off.
    "PRTE_MCA_plm_ssh_args": "-o ServerAliveInterval=1 -o ServerAliveCountMax=2",
    # Our hosts share /tmp and count their processes from 1: two launchers would take each other's files for their own.
    "PRTE_MCA_prte_tmpdir_base": "/run",
}
HANG = 8  # --guard.hang_seconds of the jobs that lose a host
SOON = 90  # seconds in which such a job must have ended, on a busy machine


@dataclass
class HostsJob(Job):
    """A job that is launched on the first host; `slots` says how many ranks each host takes."""

    net: Any = None
    slots: tuple[int, ...] = (1, 1)

    def launch(self) -> list[str]:
        hosts = ",".join(f"{name}:{n}" for name, n in zip(NAMES, self.slots, strict=True) if n)
        return [*self.net["host1"].enter(self.folder), *WAYS[self.launcher], "-H", hosts, "-np", str(sum(self.slots))]

    def start(self, *args: Any, **extra: str) -> Job:
        return super().start(*args, **LAUNCHING, **extra)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with nodes.Network(tmp_path_factory.mktemp("net"), NAMES, sshd=True) as network:
        yield network


@pytest.fixture
def job(tmp_path, fault_images, net):  # noqa: F811
    made = []

    def make(launcher: str, *options: str, **settings: Any) -> HostsJob:
        folder = tmp_path / f"job{len(made)}"
        folder.mkdir()
        one = HostsJob(folder, fault_images, options, launcher=launcher, **{"net": net, **settings})
        made.append(one)
        return one

    yield make
    for one in made:
        one.kill_everything()


@pytest.fixture(scope="module")
def one_host(tmp_path_factory, fault_images):  # noqa: F811
    """The same job with both ranks on one host: what two hosts must end with."""
    calm = Job(tmp_path_factory.mktemp("calm"), fault_images)
    assert calm.finish() == 0, calm.text()[-3000:]
    return checkpoint.load(calm.run_dir)


@pytest.mark.parametrize("launcher", WAYS)
def test_two_hosts_train_as_one_does(job, one_host, launcher):
    over = job(launcher)
    assert over.finish() == 0, over.text()[-3000:]
    assert runlog.read(over.run_dir, "start")[0]["hosts"] == NAMES
    assert over.last_step() == EPOCHS * STEPS
    assert same(checkpoint.load(over.run_dir), one_host)


TOLD = re.compile(r"Remote host: +host2|on node host2|Process name: 1\n|rank 0 on host1 made no progress")


def lost(broken: HostsJob) -> None:
    """The job has just lost its second host: it must end, tell, and leave nothing behind on either."""
    began = time.monotonic()
    code = broken.wait(SOON)
    print(f"{broken.launcher}: ended {time.monotonic() - began:.1f} s after the host was lost, exit code {code}")
    print(broken.text()[-1500:])
    assert not broken.orphans()
    assert TOLD.search(broken.text())
    # Not the exit code: Open MPI 5.0's launcher says 0 when it loses a host.
    assert broken.status()["state"] != "finished"
    assert broken.saved_step() >= 3


@pytest.mark.parametrize("launcher", WAYS)
def test_a_host_that_is_cut_off(job, net, one_host, launcher):
    broken = job(launcher, "--guard.hang_seconds", str(HANG)).start()
    with broken.held("step ([5-9]|[12].)$"):
        net["host2"].cut()
    try:
        lost(broken)
    finally:
        net["host2"].mend()
    assert broken.finish() == 0, broken.text()[-3000:]
    assert same(checkpoint.load(broken.run_dir), one_host)


@pytest.mark.parametrize("launcher", WAYS)
def test_a_host_that_dies(job, tmp_path, one_host, launcher):
    """Its work goes on on the host that is left."""
    with nodes.Network(tmp_path / "net", NAMES, sshd=True) as own:
        broken = job(launcher, "--guard.hang_seconds", str(HANG), net=own).start()
        with broken.held("step ([5-9]|[12].)$"):
            own["host2"].kill()
        lost(broken)
        broken.slots = (2, 0)
        assert broken.finish() == 0, broken.text()[-3000:]
        assert runlog.read(broken.run_dir, "start")[-1]["hosts"] == ["host1", "host1"]
        assert same(checkpoint.load(broken.run_dir), one_host)


def test_a_host_that_cannot_be_reached_is_named_at_once(job, net):
    net["host2"].cut()
    try:
        for launcher in WAYS:
            began = time.monotonic()
            refused = job(launcher).start()
            assert refused.wait(120) != 0
            print(f"{launcher}: {time.monotonic() - began:.1f} s\n{refused.text()[-800:]}")
            assert "host2" in refused.text()
    finally:
        net["host2"].mend()


def test_shards_are_copied_once_per_host(net, tmp_path, fault_images):  # noqa: F811
    """Four ranks on two hosts, each host with a disk of its own under the same path."""
    packed, local, staged = tmp_path / "packed", net.folder / "local", tmp_path / "staged"
    words = [sys.executable, "-m", "dist_lars.pack", str(fault_images), str(packed), "--size", "none"]
    assert run_command(words, 120).returncode == 0
    options = (
        "--preset", "quickstart", "--data.kind", "folder", "--data.path", str(packed), "--data.stage", str(local),
        "--data.image_size", "32", "--data.resize", "32", "--model.name", "cnn_small", "--batch_size", "8",
        "--micro_batch", "2", "--epochs", "1", "--run_dir", str(tmp_path / "run"), "--data.workers", "0",
    )  # fmt: skip
    done = net["host1"].run(
        *WAYS["gloo"], "-H", "host1:2,host2:2", "-np", "4", sys.executable, str(ROOT / "tests/hosts/worker_stage.py"),
        *options, timeout=300, cwd=tmp_path, check=False, STAGED=str(staged), **LAUNCHING,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    calls = sorted(line.split() for line in staged.read_text().splitlines())
    splits = 2  # train and val are packed apart
    assert [host for host, _ in calls] == ["host1"] * splits + ["host2"] * splits
    assert calls[:splits] == [["host1", size] for _, size in calls[splits:]]  # each copied all of it
    for name in NAMES:
        assert net[name].run("find", str(local), "-name", "*.tar").stdout.count(".tar") >= splits
    assert not list(local.iterdir())  # the disks were the hosts' own


def recorded(net, words):
    """What a benchmark over both hosts recorded; nothing of it stays among our records."""
    name, *options = words
    command = (sys.executable, "-m", f"benchmarks.{name}", "--hosts", "host1:1,host2:1", "--name", "test-hosts")
    try:
        done = net["host1"].run(*command, *options, timeout=400, cwd=ROOT, check=False, **LAUNCHING)
        assert done.returncode == 0, done.stdout[-3000:]
        return json.loads((ROOT / "benchmarks/records/test-hosts.json").read_text())
    finally:
        for path in (ROOT / "benchmarks/records").glob("test-hosts.*"):
            path.unlink()


def test_the_scaling_benchmark_shows_a_slow_link(net):
    """Two ranks send each other all gradients: at 10 Mbit/s no step can take less, whatever the machine is doing."""
    batch, speed = 8, {}
    gradients = 4 * sum(p.numel() for p in cnn_small(1000).parameters())  # bytes
    words = (
        "scaling", "--ranks", "1,2", "--model", "cnn_small", "--image_size", "32", "--batch", str(batch), "--seconds",
        "1", "--carriers", "horovod", "--option", "precision=fp32", "--option", "device=cpu",
    )  # fmt: skip
    try:
        for rate in (None, "10mbit"):
            net["host2"].limit(rate)
            body = recorded(net, words)
            assert body["ranks_per_host"] == {"1 ranks": [1], "2 ranks": [1, 1]}
            (row,) = [row for row in body["rows"] if row["carrier"] == "horovod"]
            speed[rate] = row["images/s"]
            print(f"{rate or 'no limit'}: {row['images/s']:.1f} images/s, {row['of ceiling']:.2f} of the ceiling")
    finally:
        net["host2"].limit(None)
    most = 2 * batch / (8 * gradients / 10e6)
    assert speed["10mbit"] < 1.1 * most  # the shaper lets a first burst through
    assert row["of ceiling"] < 0.5
    assert speed[None] > 1.5 * most


def test_the_other_benchmarks_go_over_hosts_too(net, tmp_path):
    """tune has the knob there that one host lacks; step its overlap, all-reduces their carriers."""
    small = ("--model", "cnn_small", "--image_size", "32", "--batch", "8", "--steps", "2")
    runs = {
        "tune": (*small, "--rounds", "1", "--knobs", "comm.hierarchical", "--out", str(tmp_path / "comm.yaml")),
        "step": (*small, "--option", "precision=fp32"),
        "allreduce": ("--largest_mb", "0.01", "--rounds", "1", "--carriers", "horovod-gloo,mpi4py"),
    }
    body = {name: recorded(net, (name, *words)) for name, words in runs.items()}
    assert all(each["ranks_per_host"] == [1, 1] for each in body.values())
    assert [row["value"] for row in body["tune"]["rows"] if row["knob"] == "comm.hierarchical"] == ["default", "True"]
    assert body["step"]["overlap"]["stand-alone ms"] > 0
    assert {row["carrier"] for row in body["allreduce"]["rows"]} == {"horovod-gloo", "mpi4py"}
