"""What the scaling benchmarks compute from their times: speeds, efficiencies, fits, overlap, choices, tables."""

import argparse
import contextlib
import mmap
import multiprocessing
import os
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import (
    allreduce,
    group,
    record,
    scaling,
    scaling_results,
    step,
    tables,
    tune,
    worker,
    worker_allreduce,
    worker_parts,
)
from benchmarks.scaling_results import PARTS, Case, Measured


def answers(block: list[list[float]]) -> list[list[dict[str, float]]]:
    """Of ranks: [rank][step] seconds, all of them in backward."""
    return [[{p: s if p == "backward" else 0.0 for p in (*PARTS, "cpu")} for s in steps] for steps in block]


def measured(case: Case, *blocks: list[list[float]], batch: int = 10) -> Measured:
    """`blocks` are as above."""
    m = Measured(case, batch)
    for block in blocks:
        m.add(answers(block))
    return m


def test_the_slowest_rank_is_the_step():
    m = measured(Case(2, "horovod"), [[1.0, 2.0], [3.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    assert m.steps().tolist() == [3.0, 2.0, 1.0, 1.0]
    assert m.speeds().tolist() == [2 * 10 * 2 / 5, 20.0]


def test_independent_ranks_add_up():
    m = measured(Case(2, "none"), [[1.0, 1.0], [2.0, 2.0]])
    assert m.speeds().tolist() == [10 + 5]
    assert m.speeds(in_step=True).tolist() == [2 * 5]
    assert m.steps() == pytest.approx([2 / 1.5] * 2)  # so long a step of two ranks would do as much


def test_a_straggler_counts_in_the_total():
    """One round of three is ten times as slow: the median of the rounds says nothing of it."""
    alone = measured(Case(2, "none"), *[[[1.0], [2.0]]] * 3)
    assert alone.total() == pytest.approx(10 + 5)
    m = measured(Case(2, "horovod"), [[1.0], [2.0]], [[20.0], [1.0]], [[2.0], [2.0]])
    assert np.median(m.speeds()) == 10
    assert m.total() == pytest.approx(20 * 3 / 24)


def test_accumulated_images_count():
    assert measured(Case(2, "horovod", passes=4), [[2.0], [2.0]]).speeds().tolist() == [40.0]


ARGS = argparse.Namespace(recipe=None, model="resnet18", image_size=224)


def test_efficiencies_are_taken_round_by_round():
    """The machine is half as fast in the second round: every efficiency is what it is in the first."""
    runs = {
        Case(1, "none"): ([[1.0]], [[2.0]]),
        Case(2, "none"): ([[1.25], [1.25]], [[2.5], [2.5]]),
        Case(2, "horovod"): ([[2.0], [1.9]], [[4.0], [3.9]]),
        Case(2, "ddp"): ([[2.5], [2.0]], [[5.0], [3.0]]),
        Case(4, "horovod"): ([[2.5]] * 4, [[5.0]] * 4),
    }
    found = {case.key(): measured(case, *blocks * 3) for case, blocks in runs.items()}
    hosts = {"1 ranks": [1], "2 ranks": [2], "4 ranks": [2, 2]}
    rows = {Case(r["ranks"], r["carrier"]): r for r in scaling.table(found, ARGS, hosts)}
    two, four = rows[Case(2, "horovod")], rows[Case(4, "horovod")]
    assert two["of 1 rank"] == 0.5
    assert two["of ceiling"] == two["of ceiling low"] == two["of ceiling high"] == 0.625
    assert two["in step"] == 0.625
    assert two["of ceiling, total"] == pytest.approx(0.625)
    assert {r["of ceiling, total"] for r in scaling.shown(list(rows.values()))} == {"", "62.5 %", "50.0 %"}
    assert two["of DDP"] == two["of DDP low"] == 1.25
    assert "of DDP" not in rows[Case(2, "ddp")]
    assert "of 1 node" not in two
    assert four["of 1 node"] == 0.8
    assert four["of 1 rank"] == 0.4
    assert four["node-hours"] == pytest.approx(2 * four["hours"])
    assert four["hours"] == pytest.approx(90 * 1_281_167 / four["images/s"] / 3600)
    split = {row["case"]: row for row in scaling.split_rows(found)}
    over = split[Case(2, "horovod").key()]  # 0.75 s in one round, 1.5 s in the other
    assert over["over ceiling ms"] == pytest.approx(1125)
    assert 750 <= over["over ceiling ms low"] < 1125 < over["over ceiling ms high"] <= 1500
    (text,) = [r["over ceiling ms"] for r in scaling.shown_split(list(split.values())) if r["case"] == over["case"]]
    assert text.startswith("1125 (")
    assert split[Case(2, "horovod").key()]["ranks apart ms"] == pytest.approx(1000 * 0.05)
    assert split[Case(2, "none").key()]["ranks apart ms"] == 0


def test_what_a_part_takes_beyond_others_is_paired_by_rounds():
    """The machine gets slower from round to round; backward of one rank has half a second more in each of them."""
    rounds = range(1, 8)
    found = {
        m.case.key(): m
        for m in (
            measured(Case(1, "none"), *[[[1.0 * n]] for n in rounds]),
            measured(Case(2, "none"), *[[[1.0 * n], [1.0 * n]] for n in rounds]),
            measured(Case(2, "horovod"), *[[[1.0 * n + 0.5], [1.0 * n]] for n in rounds]),
            measured(Case(2, "ddp"), *[[[1.0 * n], [1.0 * n]] for n in rounds]),
        )
    }
    rows = {(r["case"].split()[1], r["beyond"]): r for r in scaling_results.beyond_rows(found)}
    assert set(rows) == {("horovod", "independent"), ("horovod", "DDP"), ("ddp", "independent")}
    for other in ("independent", "DDP"):
        row = rows["horovod", other]
        for what in ("backward ms", "all ms"):
            assert row[what] == row[f"{what} low"] == row[f"{what} high"] == pytest.approx(250)
        assert row["forward ms"] == row["cpu ms"] == 0
    assert scaling_results.shown_beyond([rows["ddp", "independent"]])[0]["backward ms"] == "0 (0 to 0)"


def test_smaller_images_have_no_hours():
    assert scaling_results.time_to_end(100.0, ARGS, 2)["node-hours"] > 0
    assert scaling_results.time_to_end(100.0, argparse.Namespace(**{**vars(ARGS), "image_size": 112}), 2) == {}


def test_parts_are_told_by_turns_that_wait_for_the_device():
    """Without waiting, the marks of a GPU say when work was handed over."""
    m = measured(Case(2, "horovod"), [[1.0], [5.0]])
    m.add(answers([[2.0], [3.0]]), apart=True)
    assert m.apart_ms() == pytest.approx(500)
    assert m.parts()["backward"] == pytest.approx(2500)


def test_one_thing_varies_at_a_time():
    cases = scaling.make_cases([1, 2, 4], ["horovod", "ddp"], ["fp32", "bf16"], [1, 16], real=True)
    assert cases[0] == Case(1, "none")
    assert {c.carrier for c in cases if c.ranks == 2} == {"none", "horovod", "ddp"}
    assert [c for c in cases if c.wire != "fp32"] == [Case(4, "horovod", wire="bf16")]
    assert [c for c in cases if c.passes > 1] == [Case(4, "none", passes=16), Case(4, "horovod", passes=16)]
    assert {(c.ranks, c.carrier) for c in cases if c.data == "real"} == {(1, "none"), (4, "none"), (4, "horovod")}
    assert scaling.make_cases([1], ["horovod"], ["fp32"], [1], real=False) == [Case(1, "none")]


def test_one_rank_alone_has_no_carrier():
    cases = scaling.make_cases([1], ["ddp"], ["fp32"], [1], real=True)
    assert cases == [Case(1, "none"), Case(1, "none", data="real")]


@pytest.mark.parametrize(
    ("words", "said"),
    [("--carriers ddp,horovod --wire fp32,bf16", "put another one first, as in --carriers horovod,ddp"),
     ("--carriers none", "'none': choose from horovod, horovod-gloo, torch, ddp")],
)  # fmt: skip
def test_what_would_be_labelled_wrongly_is_refused(monkeypatch, capsys, words, said):
    monkeypatch.setattr("sys.argv", ["scaling", *words.split()])
    with pytest.raises(SystemExit):
        scaling.parse()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [("scaling --ranks 0,2", "--ranks: '0' is not a whole number from 1 on"),
     ("scaling --batch -4", "'-4' is not a whole number"),
     ("scaling --accumulation 0", "'0' is not a whole number"),
     ("scaling --rounds 0", "'0' is not a whole number"),
     ("scaling --recipe resnet18", "invalid choice: 'resnet18'"),
     ("scaling --option foo", "'foo' is not of the form KEY=VALUE"),
     ("scaling --images nowhere", "--images nowhere: there is no such folder"),
     ("scaling --compare a.json b.json", "--compare a.json: there is no such file"),
     ("tune --steps 0 --out x", "'0' is not a whole number"),
     ("tune --out nowhere/comm.yaml", "--out nowhere/comm.yaml: there is no folder nowhere"),
     ("step --steps 0", "'0' is not a whole number"),
     ("allreduce --ranks 0", "'0' is not a whole number")],
)  # fmt: skip
def test_what_cannot_be_measured_or_written_is_refused_before_anything_starts(monkeypatch, capsys, words, said):
    name, *rest = words.split()
    monkeypatch.setattr("sys.argv", [name, *rest])
    with pytest.raises(SystemExit):
        {"scaling": scaling, "tune": tune, "step": step, "allreduce": allreduce}[name].main()
    assert said in capsys.readouterr().err


def test_hosts_are_not_for_srun():
    with pytest.raises(SystemExit, match="--hosts is for mpirun and horovodrun"):
        group.start_words("srun", 2, hosts="a:1,b:1")


def test_strong_scaling_shares_one_batch():
    args = argparse.Namespace(mode="strong", batch=64)
    assert scaling.batch_of(args, Case(4, "horovod")) == 16
    with pytest.raises(SystemExit, match="--batch 64 does not divide by 3 ranks"):
        scaling.batch_of(args, Case(3, "horovod"))


def test_what_would_not_fit_into_memory_is_refused():
    """After the first rank has trained: all of them live side by side, and Linux would kill some in the middle."""

    def one(device):
        return SimpleNamespace(do=lambda _: [{"held": 1e9, "free": 5e9}], facts=[{"device": device}])

    more = [Case(8, "horovod"), Case(2, "none")]
    scaling.check_memory(one("cpu"), more, slots=3)  # of each group on one host
    with pytest.raises(SystemExit, match=r"10 more ranks of 1\.0 GB each do not fit into the 5\.0 GB"):
        scaling.check_memory(one("cpu"), more, slots=8)
    scaling.check_memory(one("cuda"), more, slots=8)  # one rank of each group on a GPU
    with pytest.raises(SystemExit, match=r"6 more ranks"):
        scaling.check_memory(one("cuda"), more * 3, slots=8)


def test_a_rank_knows_what_it_holds():
    held = worker_parts.memory(torch.device("cpu"))
    size = 50_000_000  # of new pages: the heap may have had so much to spare
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(bytes(size))
        assert worker_parts.memory(torch.device("cpu"))["held"] - held["held"] > 0.8 * size
    assert held["free"] > 0


def test_layers_add_up_to_the_step():
    """Those without parameters and those in place, too; what hands its input on takes nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(inplace=True), torch.nn.LocalResponseNorm(5), torch.nn.MaxPool2d(2),
        torch.nn.Identity(), torch.nn.Dropout(), torch.nn.Conv2d(32, 32, 3), torch.nn.Flatten(),
        torch.nn.Linear(32 * 29 * 29, 10),
    )  # fmt: skip
    layers = worker_parts.Layers(model, lambda: None)
    images, steps = torch.randn(8, 3, 64, 64), []
    with layers.attached():
        for _ in range(3):
            began = time.perf_counter()
            loss = model(images).square().mean()
            forward = time.perf_counter()
            loss.backward()
            steps.append({"forward": forward - began, "backward": time.perf_counter() - forward})
    rows = layers.rows(steps)
    by_kind = {row["kind"]: row for row in rows}
    assert [row["layer"] for row in rows] == [*map(str, range(9)), "unattributed"]
    assert by_kind["LocalResponseNorm"]["backward ms"] > by_kind["Identity"]["backward ms"] == 0
    for part in ("forward", "backward"):
        whole = 1e3 * sum(step[part] for step in steps) / 3
        assert sum(row[f"{part} ms"] for row in rows) == pytest.approx(whole)
        assert abs(rows[-1][f"{part} ms"]) < 0.1 * whole
    assert not any(m._forward_hooks for m in model)


def test_ranks_of_a_host(monkeypatch):
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert group.slots("mpirun") == group.slots("srun") == group.ANY
    assert group.slots("mpirun", "a:4,b:8,c") == 8
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "4(x2),3")
    assert group.slots("srun") == 4
    words = group.start_words("srun", 8)
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4"} <= set(words)


def test_who_is_no_rank_is_sent_away(monkeypatch):
    """One who says nothing, one who speaks something else, one with another key; then the rank."""
    monkeypatch.setattr(group, "GREETING", 1)
    one = group.Group.__new__(group.Group)
    with group.Listener(("127.0.0.1", 0), backlog=4) as listener, contextlib.ExitStack() as open_:
        strangers = [open_.enter_context(socket.create_connection(listener.address)) for _ in range(2)]
        strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n")

        def connect():
            with pytest.raises(AuthenticationError):
                Client(listener.address, authkey=b"other")
            with Client(listener.address, authkey=b"key") as client:
                client.send(3)
                said.append(client.recv())

        said = []
        rank = threading.Thread(target=connect, daemon=True)
        rank.start()
        number, connection = one._accept(listener, b"key")
        assert number == 3
        assert not connection.poll(1.2), "no time-out is left on it"
        connection.send("go")
        rank.join(10)
        connection.close()
    assert said == ["go"]


def test_all_groups_are_closed_whatever_one_says():
    closed = []

    def bad():
        raise RuntimeError("stuck")

    groups = [SimpleNamespace(close=bad), SimpleNamespace(close=lambda: closed.append(1))]
    with pytest.raises(RuntimeError, match="stuck"):
        group.close_all(groups)
    assert closed == [1]


def test_hosts_are_told_by_their_first_ranks_and_without_names():
    one = group.Group.__new__(group.Group)
    one.facts = [{"host": host, "machine": {"cpu": cpu}} for host, cpu in (("b", "x"), ("a", "y"), ("b", "-"))]
    assert one.machines() == [{"cpu": "x"}, {"cpu": "y"}]
    assert one.hosts() == [2, 1]
    told = worker.facts(torch.device("cpu"))["machine"]
    assert told["cpu"]
    assert told["cores"] >= 1
    assert os.uname().nodename not in told.values()


def test_settings_reach_other_hosts(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    words = group.start_words("mpirun", 2, ["MINE"], "a:1,b:1")
    given = [words[i + 1] for i, word in enumerate(words) if word == "-x"]
    assert {"PATH", "NCCL_SOCKET_IFNAME", "MINE"} <= set(given)
    assert len(given) == len(set(given))
    assert words[-2:] == ["-H", "a:1,b:1"]


def test_warm_up_ends_when_two_turns_agree():
    turns = iter([9.0, 5.0, 5.1, 1.0])
    one = SimpleNamespace(do=lambda _: [[dict.fromkeys(PARTS, next(turns))]])
    assert scaling.warm_up(one, {"steps": 1})
    assert next(turns) == 1.0
    turns = iter([9.0, 5.0] * 4)
    assert not scaling.warm_up(one, {"steps": 1})


def test_too_few_rounds_have_no_interval():
    few, many = (measured(Case(1, "none"), *[[[1.0]]] * n) for n in (5, 100))
    key = few.case.key()
    (row,) = scaling.table({key: few}, ARGS, {})
    assert (row["images/s"], row["low"], row["high"], row["steps"], row["max/median"]) == (10, None, None, 5, 1)
    assert "p99/median" not in row
    assert scaling.shown([row])[0]["images/s"] == "10.0"
    (row,) = scaling.table({key: many}, ARGS, {})
    assert (row["low"], row["steps"], row["p99/median"]) == (10, 100, 1)
    text = scaling.report([row], [], [], 100, 1, ["2 ddp"])
    assert "100 rounds of 1 step; not steady when they began: 2 ddp." in text
    assert "not steady" not in scaling.report([row], [], [], 100, 1, [])


def test_time_alone_does_not_end_the_rounds_too_early():
    groups, seen = {"a": SimpleNamespace(do=lambda work: [work])}, []
    assert group.in_turn(groups, lambda _: 1, 1000, lambda *a: seen.append(a), lambda: True) == group.LEAST
    assert len(seen) == group.LEAST
    assert group.in_turn(groups, lambda _: 1, 2, lambda *a: None, lambda: True) == 2


def test_what_the_words_mean_stands_beside_the_numbers():
    words = "Of 1 rank|1 node|Of ceiling|In step|Of DDP|p99/median|Hours|`data`|`rest`|`cpu`|`none`|Beyond"
    for word in words.split("|"):
        assert word in scaling.definitions()


def test_two_records_are_compared_case_by_case():
    def of(speed):
        base = {"ranks": 2, "carrier": "horovod", "data": "synthetic", "wire": "fp32", "passes": 1}
        row = {**base, "images/s": speed, "low": speed - 1, "high": speed + 1, "of ceiling": speed / 20}
        return {"model": "resnet18", "rows": [row]}

    (row,) = scaling.compare(of(10.0), of(12.0))
    assert (row["ratio"], row["low"], row["high"]) == (1.2, 11 / 11, 13 / 9)
    assert (row["of ceiling before"], row["of ceiling after"]) == (0.5, 0.6)
    with pytest.raises(SystemExit, match="different work .model resnet18 and alexnet"):
        scaling.compare(of(10.0), {**of(12.0), "model": "alexnet"})
    with pytest.raises(SystemExit, match="no case in common"):
        scaling.compare(of(10.0), {"model": "resnet18", "rows": [{**of(1.0)["rows"][0], "ranks": 3}]})


def test_latency_and_bandwidth_are_found_again():
    sizes = [4, 4096, 10**6, 10**8]
    a, b = allreduce.fit(sizes, [2e-5 + s / 3e9 for s in sizes])
    assert (a, b) == (pytest.approx(2e-5), pytest.approx(3e9))


def timeline(*reduced: tuple[str, float, float]) -> list[dict]:
    """Events as Horovod writes them, microseconds since its start at 7 s: when the all-reduce of a bucket ran."""
    names = sorted({row[0] for row in reduced})
    events = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": 7_000_000}}]
    for i, name in enumerate(names, 1):
        events.append({"name": "process_name", "ph": "M", "pid": i, "args": {"name": f"allreduce.{name}"}})
    for name, began, ended in reduced:
        pid = 1 + names.index(name)
        events += [
            {"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "pid": pid, "ts": began - 500},
            {"ph": "E", "pid": pid, "ts": began},
            {"ph": "B", "name": "ALLREDUCE", "pid": pid, "ts": began},
            {"ph": "B", "name": "MPI_ALLREDUCE", "pid": pid, "ts": began},
            {"ph": "E", "pid": pid, "ts": ended},
            {"ph": "E", "pid": pid, "ts": ended},
        ]
    return events


def test_what_runs_after_backward_has_ended_is_exposed():
    """Two steps: backward ends 10 ms after the first begins, the last bucket 4 ms later; and 1 s later the same."""
    events = timeline(
        ("gradients.0", 1e3, 5e3), ("notes", 2e3, 9e3), ("gradients.1", 11e3, 14e3),
        ("gradients.0", 1001e3, 1005e3), ("gradients.1", 1011e3, 1014e3),
    )  # fmt: skip
    found = step.overlap(events, [[7.010, 8.002], [7.004, 8.010]], standalone=[0.010])
    assert found["steps"] == 2
    assert found["all-reduce ms"] == pytest.approx(7.0)
    assert found["exposed ms"] == pytest.approx(4.0)
    assert found["exposed / stand-alone"] == pytest.approx(0.4)
    assert found["low"] is found["high"] is None, "of two steps"
    assert found["ranks apart ms"] == pytest.approx(7.0)  # waiting for the last rank is no communication
    with pytest.raises(SystemExit, match="'gradients.0': 2, 'gradients.1': 2"):
        step.overlap(events, [[7.010], [7.010]], standalone=[0.010])


def test_both_sides_of_the_overlap_are_uncertain():
    sure, unsure = [1.0] * 10, [0.5, 1.5] * 5
    assert step.ratio_of_medians(sure, sure) == (1, 1)
    for pair in ((sure, unsure), (unsure, sure)):
        low, high = step.ratio_of_medians(*pair)
        assert low < 0.9 < 1.1 < high
    assert step.ratio_of_medians(sure, sure[:5]) == (None, None)


@pytest.mark.parametrize(
    ("reduce", "said"), [(lambda flat: flat.mul_(2).add_(1), ""), (lambda flat: flat.mul_(2), "wrong")]
)
def test_an_all_reduce_is_timed_only_if_its_sum_is_right(monkeypatch, reduce, said):
    """Rank 0 of two, whose carrier is a stand-in that adds rank 1's numbers, or forgets some."""
    ours, theirs = multiprocessing.Pipe()
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setitem(worker_allreduce.CARRIERS, "stand-in", lambda cpu: (0, 2, reduce))
    for work in ({"elements": 1500, "repeat": 3}, None):
        ours.send(work)
    with pytest.raises(
        (SystemExit, worker.Finished), match="stand-in: the sum of 1500 numbers is wrong" if said else None
    ):
        worker_allreduce.reduce_sizes({"carrier": "stand-in", "device": "cpu"}, theirs)
    ours.recv()  # what the rank is
    assert ours.poll() == (not said)


def test_records_show_what_was_asked_of_them():
    """The goals of two ranks on two cores, by the medians; that DDP is not surely faster, by the intervals."""
    rows = {
        name: {(r["ranks"], r["carrier"]): r for r in record.read(f"scaling_{name}")["rows"]}
        for name in ("resnet18", "alexnet")
    }
    assert rows["resnet18"][2, "horovod"]["of ceiling"] >= 0.95
    for name, row in rows.items():
        assert row[2, "horovod"]["of DDP high"] >= 1, name
    assert rows["alexnet"][2, "horovod"]["of ceiling"] >= 0.85
    assert record.read("step_resnet18")["overlap"]["exposed / stand-alone"] < 0.5


def test_no_group_is_always_the_first():
    order = []
    groups = {name: SimpleNamespace(do=lambda work: [work]) for name in "abc"}
    group.in_turn(groups, lambda name: name, 4, lambda name, answers: order.append((name, *answers)), lambda: False)
    assert "".join(name for name, _ in order) == "abcbcacababc"
    assert all(name == answer for name, answer in order)


def tuned(speeds: dict[str, list[float]], *equal: str) -> list[dict]:
    case = Case(1, "horovod")
    found = {name: measured(case, *([[10 / v]] for v in values)) for name, values in speeds.items()}
    return [tune.row_of("comm.cycle_ms", name, found, name in equal) for name in speeds]


@pytest.mark.parametrize("varied", ["ranks", "wire"])
def test_a_plot_shows_what_varies(monkeypatch, tmp_path, varied):
    panels = []
    monkeypatch.setattr(scaling.show, "plots", lambda path, *drawn: panels.extend(drawn))
    row = {"data": "synthetic", "wire": "fp32", "passes": 1, "images/s": 10.0, "low": None, "high": None}
    rows = [{**row, "ranks": 1, "carrier": "none"}, {**row, "ranks": 2, "carrier": "none", "images/s": 19.0}]
    two = {**row, "ranks": 2, "carrier": "horovod", "images/s": 18.0}
    rows += [{**two, "of 1 rank": 0.9, "of 1 rank low": 0.8, "of 1 rank high": 1.0}]
    rows += [{**two, "wire": "bf16"}] if varied == "wire" else []
    args = argparse.Namespace(model="resnet18", batch=8, image_size=32, mode="weak")
    scaling.draw(rows, tmp_path / "x.png", args)
    (points, how), *more = panels
    if varied == "wire":
        assert [p["case"] for p in points] == ["1 rank\nfp32", "2 ranks\nfp32", "2 ranks\nfp32", "2 ranks\nbf16"]
        return
    assert {(p["who"], p["ranks"]): p["images/s"] for p in points}["1 rank x N", 2] == 20
    ((share, how),) = more
    seen = {(p["who"], p["ranks"]): (p["of 1 rank"], p["low"]) for p in share}
    assert seen["horovod", 2] == (0.9, 0.8)
    assert seen["ceiling", 2] == (0.95, None)
    assert seen["horovod", 1] == seen["1 rank x N", 2] == (1, None)


def test_a_knob_is_turned_only_for_a_sure_gain():
    speeds = {"default": [10.0] * 8, "5": [9.0, 12.0] * 4, "20": [10.5, 10.6] * 4}
    assert tune.choose(tuned(speeds)) == "20"
    assert tune.choose(tuned({"default": [10.0] * 8, "5": [9.0, 12.0] * 4})) is None
    assert tune.choose(tuned(speeds, "20")) is None, "the default against itself is noise, however fast"
    assert tune.choose(tuned({name: values[:5] for name, values in speeds.items()})) is None, "too few rounds"


def test_a_value_that_is_the_default_is_known_as_such():
    cpu = {"HOROVOD_CYCLE_TIME": "5", "HOROVOD_FUSION_THRESHOLD": "0", "OMPI_MCA_mpi_yield_when_idle": "1"}
    theirs = {name: tune.UNSET[name] for name in tune.THEIRS}
    for equal in ({}, {"comm.cycle_ms": 5.0}, {"comm.fusion_mb": 0.0}):
        assert tune.is_default(equal, cpu)
    for other in ({"comm.cycle_ms": 1.0}, {"comm.fusion_mb": 128.0}, {"comm.cache": 0}, {"comm.bucket_mb": 5.0},
                  {"comm.cycle_ms": 5.0, "comm.wire": "bf16"}, theirs):  # fmt: skip
        assert not tune.is_default(other, cpu)
    assert tune.is_default(theirs, {}), "on GPUs we change nothing"


@pytest.fixture
def fake_groups(monkeypatch):
    """`fake_groups(fast)`: in place of groups of ranks, whose steps take 1 s, or 0.5 s where `fast(settings, turn)`."""

    def put(fast):
        turns = iter(range(10**6))

        def start(args, settings):
            turn = next(turns)

            def do(work):
                seconds = 0.5 if fast(settings, turn) else 1.0
                step = {p: seconds if p == "forward" else 0.0 for p in (*PARTS, "cpu")}
                return [[step] * work["steps"]] * args.ranks

            return SimpleNamespace(do=do, facts=[{"environment": {}}], hosts=lambda: [2], close=lambda: None)

        monkeypatch.setattr(tune, "start", start)

    return put


@pytest.mark.parametrize("lucky", [False, True])
def test_what_is_put_down_is_measured_once_more(fake_groups, monkeypatch, tmp_path, lucky):
    """Every knob against the plain defaults; then all of them together, and only that counts."""
    from dist_lars.cli import load_config

    asked, last = [], 3 + 4 + 3  # groups before the final turn: of the defaults, of two knobs

    def fast(settings, turn):
        asked.append(dict(settings))
        return settings.get("comm.bucket_mb") == 5.0 and not (lucky and turn >= last)

    fake_groups(fast)
    monkeypatch.setattr(record, "write", lambda name, rows, raw, **extra: found.update(extra, rows=rows, raw=raw)
                        or tmp_path / f"{name}.json")  # fmt: skip
    found, out = {}, tmp_path / "comm.yaml"
    words = ["tune", "--knobs", "comm.cycle_ms,comm.bucket_mb", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    tune.main()
    assert found["tried_together"] == {"comm.bucket_mb": 5.0}
    assert found["chosen"] == ({} if lucky else {"comm.bucket_mb": 5.0})
    assert load_config("resnet18_8k", str(out)).comm.bucket_mb == (25.0 if lucky else 5.0)
    assert {"comm.bucket_mb": 100.0} in asked, "against the plain defaults"
    assert [r["value"] for r in found["rows"] if r["knob"] == "-"] == ["default", "again", "Horovod's own defaults"]
    assert found["raw"]["comm.bucket_mb=5.0 rank 1"] == [0.5] * 24
    assert found["still_warming_up"] == []


def test_an_unknown_knob_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--knobs", "comm.cycle", "--out", "x"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "there is no 'comm.cycle'; choose from comm.cycle_ms, comm.bucket_mb" in capsys.readouterr().err


def test_what_tune_writes_is_a_config(tmp_path):
    from dist_lars.cli import load_config

    file = tmp_path / "comm.yaml"
    file.write_text(tune.as_yaml({"comm.cycle_ms": 20.0, "comm.bucket_mb": 5.0}, "tune_resnet18"))
    config = load_config("resnet18_8k", str(file))
    assert (config.comm.cycle_ms, config.comm.bucket_mb, config.batch_size) == (20.0, 5.0, 8192)
    file.write_text(tune.as_yaml({}, "tune_resnet18"))
    assert load_config("resnet18_8k", str(file)).comm == load_config("resnet18_8k").comm
    for knob, values in tune.GRID.items():
        for value in values:
            assert load_config(overrides={knob: value})


def test_the_tables_of_the_pages_are_current():
    shown = set()
    for page in tables.PAGES:
        text = page.read_text()
        shown.update(tables.names(text))
        assert tables.filled(text, page) == text, "make tables"
    recorded = {path.stem.replace("study-", "study_") for path in record.RECORDS.glob("study-*.md")}
    assert shown == {name for name in tables.TABLES if not name.startswith("study_") or name in recorded}


@pytest.mark.parametrize(("model", "least"), [("resnet18", 0.95), ("alexnet", 0.85)])
def test_the_stored_records_hold_what_was_asked_of_scaling(model, least):
    """Of the machine's own ceiling; not surely behind DDP; all-reduces hidden; defaults that nothing surely beats."""
    body = {kind: record.read(f"{kind}_{model}") for kind in ("scaling", "step", "tune")}
    (row,) = [r for r in body["scaling"]["rows"] if (r["ranks"], r["carrier"]) == (2, "horovod")]
    assert row["of ceiling"] >= least
    assert row["of DDP high"] >= 1
    assert body["step"]["overlap"]["high"] < 0.5
    assert not body["tune"]["chosen"]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_table_that_is_not_current_is_noticed(page):
    text = page.read_text()
    number = next(m[2] for m in tables.MARKS.finditer(text))
    start = text.index(f"<!-- table: {number} -->")
    digit = next(i for i in range(start, len(text)) if text[i].isdigit())
    broken = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    assert tables.filled(broken, page) != broken
    assert tables.filled(broken, page) == tables.filled(text, page)


def test_steps_of_unlike_parts_are_summed():
    m = Measured(Case(1, "none"), 1)
    m.add([[dict.fromkeys((*PARTS, "cpu"), 1.0)]])
    assert m.steps().tolist() == [len(PARTS)]
    assert m.parts() == dict.fromkeys(PARTS, 1000.0)
    assert isinstance(m.speeds(), np.ndarray)
