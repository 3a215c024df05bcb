"""The benchmarks of scaling, as small as they get: they run to their end, and their records hold what tables need."""

import functools
import json
import sys

import pytest

from benchmarks import allreduce, record, scaling, step, tune

pytestmark = pytest.mark.studies
SMALL = ("--model", "cnn_small", "--batch", "2", "--image_size", "16")


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """`measure(module, "--word", ...)` -> its record; files land in tmp_path."""
    monkeypatch.setattr(record, "write", functools.partial(record.write, folder=tmp_path))

    def run(module, *words):
        monkeypatch.setattr(sys, "argv", [module.__name__, *words, "--name", "small"])
        module.main()
        return json.loads((tmp_path / "small.json").read_text())

    return run


def test_scaling(measure, tmp_path, image_folder, monkeypatch, capsys):
    words = ("--ranks", "1,2", "--steps", "1", "--rounds", "2", "--carriers", "horovod,ddp", "--accumulation", "2")
    body = measure(scaling, *SMALL, *words, "--wire", "bf16", "--images", str(image_folder))
    cases = [(r["ranks"], r["carrier"], r["data"], r["wire"], r["passes"]) for r in body["rows"]]
    assert cases == [
        (1, "none", "synthetic", "fp32", 1), (2, "none", "synthetic", "fp32", 1),
        (2, "horovod", "synthetic", "fp32", 1), (2, "ddp", "synthetic", "fp32", 1),
        (2, "horovod", "synthetic", "bf16", 1), (2, "none", "synthetic", "fp32", 2),
        (2, "horovod", "synthetic", "fp32", 2), (1, "none", "real", "fp32", 1), (2, "none", "real", "fp32", 1),
        (2, "horovod", "real", "fp32", 1),
    ]  # fmt: skip
    assert all(r["images/s"] > 0 for r in body["rows"])
    assert body["computes_in"] in ("float32", "bfloat16")
    assert len(body["raw_seconds"]["2 horovod fp32 x1 synthetic rank 1"]) == 2
    assert next(row for row in body["split"] if row["case"] == "2 horovod fp32 x1 real")["data"] > 0
    assert (tmp_path / "small.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "small.md").read_text().count("| --- ") > 1
    path = str(tmp_path / "small.json")
    monkeypatch.setattr(sys, "argv", ["scaling", "--compare", path, path])
    capsys.readouterr()
    scaling.main()
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines())
    assert [row[head.index("ratio")] for row in rows] == ["1.00"] * len(cases)


def test_step(measure):
    body = measure(step, *SMALL, "--steps", "2")
    assert [row["case"] for row in body["rows"]] == ["1 rank alone", "2 ranks, Horovod"]
    assert body["overlap"]["steps"] == 2
    assert body["overlap"]["stand-alone ms"] > 0
    assert {row["kind"] for row in body["layers"]} >= {"Conv2d", "Linear"}


def test_tune(measure, tmp_path):
    from dist_lars.cli import load_config

    out = tmp_path / "comm.yaml"
    body = measure(tune, *SMALL, "--steps", "1", "--rounds", "2", "--knobs", "comm.cache", "--out", str(out))
    assert [row["value"] for row in body["rows"]] == ["default", "again", "Horovod's own defaults", "default", "0"]
    assert load_config("resnet18_8k", str(out)).comm.cache == body["chosen"].get("comm.cache")


def test_allreduce(measure):
    body = measure(allreduce, "--largest_mb", "0.0001", "--rounds", "1")
    assert {(row["carrier"], row["MB"]) for row in body["rows"]} == {
        (carrier, size / 1e6) for carrier in allreduce.CARRIERS for size in (4, 32)
    }
    assert [row["carrier"] for row in body["fits"]] == list(allreduce.CARRIERS)
