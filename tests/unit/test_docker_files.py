"""docker/: every file that is copied is sent, compose.yaml says what the specification knows, README what there is."""

import fnmatch
import re

import pytest
import yaml

from tests.conftest import ROOT
from tests.docker import engines

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
# Of https://github.com/compose-spec/compose-spec, 05-services.md: what a service may hold, as far as we use it.
SERVICE = {
    "build", "command", "depends_on", "healthcheck", "hostname", "image", "init", "shm_size", "ulimits", "volumes",
}  # fmt: skip
INSIDE = {
    "build": {"context", "dockerfile"},
    "healthcheck": {"test", "interval", "retries"},
    "ulimits": {"memlock", "stack"},
}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


def copied() -> list[str]:
    """What the Dockerfile takes from the clone."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M)
    return [source for line in lines for source in line.split()[:-1]]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path, or the folder that it lies in, through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    return any(path == rule or path.startswith(f"{rule}/") for rule in allowed)


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_exists_and_is_sent(source):
    assert sent(source)
    if set("*?[") & set(source):
        parent, pattern = source.rsplit("/", 1)
        assert fnmatch.filter([path.name for path in (ROOT / parent).iterdir()], pattern)
    else:
        assert (ROOT / source).exists()


def test_nothing_large_or_private_is_sent():
    for path in (".git", ".venv", "runs", "data", "tests", ".ci", "benchmarks"):
        assert not sent(path)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_only_what_the_specification_knows(name):
    service = COMPOSE["services"][name]
    assert service.keys() <= SERVICE
    for key, known in INSIDE.items():
        assert service.get(key, {}).keys() <= known
    for other, how in service.get("depends_on", {}).items():
        assert other in COMPOSE["services"]
        assert how["condition"] in CONDITIONS
        assert how["condition"] != "service_healthy" or "healthcheck" in COMPOSE["services"][other]
    assert all(volume.split(":")[0] in COMPOSE["volumes"] for volume in service["volumes"])
    assert {key for key in COMPOSE if not key.startswith("x-")} <= {"services", "volumes", "name", "networks"}


def test_the_hosts_of_the_launch_line_are_services():
    hosts = re.search(r"-H (\S+)", COMPOSE["services"]["node1"]["command"])[1]
    assert [host.split(":")[0] for host in hosts.split(",")] == list(COMPOSE["services"])
    assert all(name == service["hostname"] for name, service in COMPOSE["services"].items())
    assert len({service["image"] for service in COMPOSE["services"].values()}) == 1


def test_build_arguments_of_the_readme_exist():
    section = (ROOT / "README.md").read_text().split("\n## Docker\n")[1].split("\n## ")[0]
    table = section.split("| build argument |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([A-Z_]+)=", table))
    assert named == set(re.findall(r"^ARG ([A-Z_]+)", DOCKERFILE, re.M))


def test_a_full_disk_is_not_filled_further(monkeypatch, tmp_path):
    """Layers that may be thrown away count as room."""
    monkeypatch.setattr(engines, "works", lambda program: False)
    monkeypatch.setattr(engines.os, "geteuid", lambda: 0)
    monkeypatch.setattr(engines.packages, "obstacle", lambda programs: None)
    monkeypatch.setattr(engines, "store", lambda: tmp_path)
    monkeypatch.setattr(engines, "free", lambda folder: 6e9)
    monkeypatch.setattr(engines, "folder_size", lambda folder: 2e9)
    with pytest.raises(engines.NoEngine, match=r"take 20 GB, and .* has room for 8.0: free some"):
        engines.find()
    monkeypatch.setattr(engines, "folder_size", lambda folder: 15e9)
    assert isinstance(engines.find(), engines.Buildah)
