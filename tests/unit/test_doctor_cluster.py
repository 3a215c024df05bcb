"""What the doctor concludes from the facts of many nodes: the sick one is named, with cause and repair."""

import dataclasses
import json
import re

import pytest

from dist_lars import doctor_reach
from dist_lars import doctor_verdict as verdict
from dist_lars.config import Config as Settings
from dist_lars.config import Data
from dist_lars.data.folder import index_folder
from dist_lars.data.packing import Options, pack
from dist_lars.doctor_host import Check
from dist_lars.doctor_node import look_at_data, places, probe, source_digest
from dist_lars.doctor_reach import Door, open_door, unreached
from dist_lars.doctor_roll import EXIT_APART, EXIT_SICK, EXIT_SLOW, Roll, Stand, behind
from dist_lars.doctor_verdict import Facts, Link, Place


def facts(nodes=128, per_node=4, **changed):
    """Ranks of equal GPU nodes n0, n1 ...; `n3={"data": "x"}` changes the facts of a node's ranks."""
    found = []
    for rank in range(nodes * per_node):
        host, local = f"n{rank // per_node}", rank % per_node
        one = Facts(
            rank=rank, host=host, local_rank=local, local_size=per_node, device="GPU X", device_id=f"{host}-{local}",
            gpus_granted=per_node, gpus_seen=per_node, cpu="CPU Y", cores=8, memory=512.0,
            operations="MPI controller; built in MPI, GLOO, NCCL",
            versions={"python": "3.11", "torch": "2.14.1", "horovod": "0.28.1", "dist_lars": "0.1"},
            places=(Place("scratch", "/tmp", free=9e10), Place("run directory", "/r", free=9e12)) if local == 0 else (),
        )  # fmt: skip
        found.append(dataclasses.replace(one, **changed.get(host, {})))
    return found


def found(check):
    """(status, everything that is printed of it)."""
    return check.status, f"{check.value} -> {check.fix}"


def test_512_equal_ranks_are_fine():
    checks = verdict.judge(facts(), cpu_wanted=False)
    assert [c.status for c in checks] == 6 * ["ok"]
    assert checks[0].value == "512 x GPU X on 128 nodes"
    lines = verdict.node_table(facts()).splitlines()
    assert len(lines) == 129
    assert lines[2].split()[:2] == ["n1", "4-7"]


@pytest.mark.parametrize(
    ("changed", "name", "words"),
    [
        ({"versions": {"python": "3.11", "torch": "2.13.0", "horovod": "0.28.1", "dist_lars": "0.1"}}, "versions",
         ["torch is 2.14.1 on most nodes; 2.13.0 on n77", "one environment"]),
        ({"operations": "MPI controller; built in MPI"}, "horovod", ["on n77", "one environment"]),
        ({"foreign_mpi": "/opt/libmpi.so.40"}, "horovod", ["loads /opt/libmpi.so.40 on n77", "LD_LIBRARY_PATH"]),
        ({"device": "cpu", "device_id": "", "gpus_seen": 0}, "devices", ["torch sees none on n77", "nvidia-smi"]),
        ({"device_id": "same"}, "devices", ["share one GPU", "on n77", "--gpu-bind=none"]),
        ({"data": "/d/train: No such file or directory"}, "data", ["not visible on n77: /d/train", "--exclude=n77"]),
        ({"data_fault": "/d/train is empty"}, "data", ["/d/train is empty, says n77 -> README.md"]),
        ({"places": (Place("scratch", "/tmp", "Permission denied"),)}, "scratch",
         ["scratch /tmp: Permission denied, on n77", "--exclude=n77"]),
        ({"places": (Place("run directory", "/r", "Disk quota exceeded"),)}, "scratch", ["on n77", "container"]),
    ],
)  # fmt: skip
def test_the_sick_node_is_named(changed, name, words):
    checks = verdict.judge(facts(n77=changed), cpu_wanted=False)
    (bad,) = [c for c in checks if c.status != "ok"]
    assert (bad.name, bad.status) == (name, "FAIL")
    assert all(word in found(bad)[1] for word in words), found(bad)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cpu": "CPU Old"}, ["CPU Old on n77", "slowest"]),
        ({"device": "GPU Z"}, ["GPU Z on n77 (rank 308)", "slowest", "--constraint"]),
        ({"driver": "570.1"}, ["CUDA driver none on most nodes; 570.1 on n77", "--constraint"]),
        ({"places": (Place("shared memory", "/dev/shm", free=64e6),)}, ["/dev/shm has 0.1 GB free on n77"]),
        ({"places": (Place("run directory", "/r", free=9e12, files=12),)}, ["takes 12 more files on n77", "container"]),
    ],
)
def test_what_only_costs_is_a_warning(changed, words):
    (bad,) = [c for c in verdict.judge(facts(n77=changed), cpu_wanted=False) if c.status != "ok"]
    assert bad.status == "warn"
    assert all(word in found(bad)[1] for word in words), found(bad)


def test_uneven_nodes_missing_nccl_and_cpu_runs():
    assert verdict.check_devices(facts(2)[:-1], False).status == "warn"
    plain = [dataclasses.replace(f, operations="MPI controller; built in MPI") for f in facts(2)]
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in verdict.check_operations(plain).fix
    cpus = [dataclasses.replace(f, device="cpu", device_id="", gpus_seen=0) for f in facts(2)]
    assert verdict.check_devices(cpus, cpu_wanted=True).status == "ok"
    assert verdict.check_devices(cpus, cpu_wanted=False).status == "FAIL"
    assert "a GPU on most nodes; cpu on n1" in verdict.check_devices([*facts(1), *cpus[4:]], cpu_wanted=True).value
    blind = [dataclasses.replace(f, data="/d: gone" if f.local_rank == 0 else "") for f in facts(3)]
    assert "not visible on any node: /d: gone" in verdict.check_data(blind).value
    assert "DIST_LARS_DATA" in verdict.check_data(blind).fix


def test_two_nodes_that_differ_are_both_shown():
    two = facts(2, n1={"cpu": "other"})
    assert verdict.check_cpus(two).value == "CPU Y on n0; other on n1"


@pytest.mark.parametrize(("offset", "status"), [(0.01, "ok"), (-3.0, "warn"), (90.0, "FAIL")])
def test_clocks(offset, status):
    got, text = found(verdict.check_clocks({"n0": 0.0, "n1": 0.002, "n2": offset}))
    assert got == status
    assert status == "ok" or f"that of n2 is {offset:+.1f} s off" in text


def ring(*rates):
    n = len(rates)
    return [Link(f"n{i}", f"n{(i + 1) % n}", rate * 1e9) for i, rate in enumerate(rates)]


@pytest.mark.parametrize(
    ("rates", "status", "words"),
    [
        ((10, 9, 8, 10), "ok", "4 nodes in a ring: 8 to 10 GB/s"),
        ((10, 1, 1, 10), "FAIL", "n2 is slow to both of its neighbours"),
        ((1, 10, 10, 1), "FAIL", "n0 is slow to both"),
        ((1, 1, 10), "FAIL", "n1 is slow to both"),
        ((10, 1, 10, 10), "warn", "n1 to n2 is slow"),
    ],
)
def test_a_slow_node_has_two_slow_links(rates, status, words):
    got, text = found(verdict.check_ring(ring(*rates), len(rates)))
    assert (got, words in text) == (status, True), text


def test_a_part_of_the_ring_one_link_and_none():
    assert "the first 3 of 9 nodes" in verdict.check_ring(ring(5, 5, 5, 5)[:2], 9).value
    assert "n0 to n1 2 GB/s" in verdict.check_ring([Link("n0", "n1", 2e9)], 2).value
    assert verdict.check_ring([], 1).status == "ok"
    assert verdict.check_ring(ring(1, 9, 9, 1)[:3], 9).status == "warn"  # n0's other neighbour was not tried


def test_bus_bandwidth():
    check = verdict.check_allreduce([0.2, 0.1], 4, 64 << 20)
    assert "64 MB over 4 ranks in 100.0 ms, bus bandwidth 1.01 GB/s" in check.value  # 2 x 3/4 x 67.1 MB / 0.1 s
    slow = verdict.check_allreduce([2.0], 4, 64 << 20)
    assert (slow.status, "INTERFACE" in slow.fix) == ("warn", True)


def test_a_folder_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in probe("scratch", str(tmp_path / "file" / "x")).problem or probe("s", "/proc/x").problem
    good = probe("scratch", str(tmp_path / "new"))
    assert not good.problem
    assert good.free > 0
    assert not list((tmp_path / "new").iterdir())


def test_data_is_looked_for_where_the_run_would(tmp_path):
    at = lambda path, **more: look_at_data(Settings(data=Data(path=str(path), **more)))  # noqa: E731
    assert at(tmp_path / "no") == (f"{tmp_path}/no/train: No such file or directory", "")
    (tmp_path / "train").mkdir()
    assert "no validation folder: looked for" in at(tmp_path)[1]
    (tmp_path / "val" / "class").mkdir(parents=True)
    assert at(tmp_path) == ("", f"{tmp_path}/train is empty")
    (tmp_path / "train" / "class").mkdir()
    assert at(tmp_path) == ("", "")
    assert "train is an image folder, and data.stage copies packed shards" in at(tmp_path, stage="/local")[1]
    assert look_at_data(Settings(data=Data(stage="/local", kind="synthetic"))) == ("", "")


def test_packed_shards_are_looked_at(tmp_path, image_folder):
    for part in ("train", "val"):
        pack(index_folder(str(image_folder / part)), str(tmp_path / part), Options(None, 90, 0.02), 1, lambda n: None)
    config = Settings(data=Data(path=str(tmp_path), stage="/local"))
    assert look_at_data(config) == ("", "")
    shard = tmp_path / "val/shard-000000.tar"
    shard.rename(shard.with_suffix(".away"))
    assert look_at_data(config) == (f"{shard}: No such file or directory", "")
    (tmp_path / "train/shards.json").write_text("{}")
    assert "pack again" in look_at_data(config)[1]


def test_what_is_not_staged_needs_no_place():
    config = Settings(data=Data(kind="digits", stage="$NEVER_SET"))
    assert [place.what for place in places(config, None)] == ["scratch", "shared memory", "cache"]
    config = Settings(data=Data(stage="$NEVER_SET"))
    assert "the variable is not set" in places(config, None)[2].problem


def test_another_checkout_has_another_digest(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before


def test_the_roll_names_who_is_behind(tmp_path):
    rolls = [Roll(tmp_path, rank) for rank in range(3)]
    for roll in rolls:
        roll.at("starting", answers=True)
    assert behind(rolls[0].call(), 4)[:2] == (EXIT_SICK, "rank 3 never started")
    assert behind(rolls[0].call(), 3)[:2] == (EXIT_APART, "all ranks wait for each other")
    for roll in rolls:
        roll.at("importing torch", answers=True)
    assert "slow file system" in behind(rolls[0].call(), 3)[1]
    rolls[0].at("reducing", answers=True)
    rolls[2].at("reducing", answers=True)
    code, text, _ = behind(rolls[2].call(), 3)
    assert code == EXIT_SLOW  # a second try finds the files in its memory
    assert re.match(r"rank 1 still is importing torch on \S+: the environment lies on a slow file system", text)
    rolls[1].at("looking around", answers=True)
    code, text, repair = behind(rolls[2].call(), 3)
    assert code == EXIT_SICK
    assert text.startswith("rank 1 on ")
    assert text.endswith("stands at 'looking around' while the others do not")
    assert "--exclude=" in repair
    rolls[1].at("reducing")
    assert "rank 1 on" in behind(rolls[2].call(), 3)[1]
    assert "answers no more" in behind(rolls[2].call(), 3)[1]


def stand(host, rank=0, unreached=None, stage="joining"):
    return rank, Stand(Door(host, [f"10.0.0.{host[1:]}/24"], 7), stage, True, unreached)


def test_a_rank_that_never_started_has_a_node():
    """SLURM's list names the node, whether none or one of its ranks is missing, under long or short names."""
    called = dict([stand("n1.local", 0), stand("n1.local", 1), stand("n2.local", 2)])
    text, repair = behind(called, 6, ["n1", "n2", "n3"])[1:]
    assert text == "rank 3-5 never started, on n3"
    assert "--exclude=n3" in repair
    assert behind(called, 4, ["n1", "n2"])[1] == "rank 3 never started, on n2"
    assert "not among n1.local, n2.local" in behind(called, 4, ["cloud-1", "cloud-2"])[2]  # SLURM's names are others


def test_the_node_that_nobody_reaches_is_named():
    told = {
        "n1": {"n2": "", "n3": "10.0.0.3"},
        "n2": {"n1": "", "n3": "10.0.0.3"},
        "n3": {"n1": "10.0.0.1", "n2": "10.0.0.2"},
    }
    called = dict(stand(host, rank, own) for rank, (host, own) in enumerate(told.items()))
    code, text, repair = behind(called, 3)
    assert (code, text) == (EXIT_SICK, "no connection from the other nodes to n3 (10.0.0.3)")
    assert "--exclude=n3" in repair
    called = dict([stand("n1", 0, {"n2": "10.0.0.2"}), stand("n2", 1, {"n1": "10.0.0.1"})])
    code, text, repair = behind(called, 2)
    assert (code, text) == (EXIT_APART, "the nodes do not reach each other: n1 (10.0.0.1) and n2 (10.0.0.2)")
    assert "INTERFACE" in repair
    called = dict([stand("n1", 0, {"n2": ""}), stand("n2", 1, {"n1": ""})])
    assert behind(called, 2)[1] == "all ranks wait for each other"


def test_an_open_door_answers_and_a_closed_one_does_not(monkeypatch):
    monkeypatch.setattr(doctor_reach, "CONNECT", 0.2)  # all of it is this host
    listener, door = open_door()
    here = Door("here", ["127.0.0.2/8"], door.port)
    there = Door("there", ["127.0.0.1/8"], door.port)
    assert unreached(here, [here, there]) == {"there": ""}
    listener.close()
    assert unreached(here, [here, there]) == {"there": "127.0.0.1"}
    listener, door = open_door()
    with listener:
        assert unreached(here, [Door("there", [], door.port)]) == {"there": "no address"}
    # On no network in common, one answer is enough; an address that both have is no way between them.
    listener, door = open_door()
    with listener:
        far = Door("far", ["192.0.2.1/32", "127.0.0.1/32", "172.17.0.1/16"], door.port)
        assert unreached(Door("here", ["10.0.0.1/24", "172.17.0.1/16"], 1), [far]) == {"far": ""}


def test_the_verdict_outlives_the_roll(tmp_path):
    roll = Roll(tmp_path, 0)
    roll.at("starting")
    roll.conclude([Check("clocks", "ok", "fine")])
    assert [p.name for p in tmp_path.iterdir()] == ["preflight.json"]
    roll.at("late")
    Roll(tmp_path, 1).conclude([Check("progress", "FAIL", "a consequence")])
    assert json.loads((tmp_path / "preflight.json").read_text())[0]["name"] == "clocks"
    Roll(tmp_path, 0)
    assert not (tmp_path / "preflight.json").exists()
