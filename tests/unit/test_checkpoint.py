"""Checkpoints: whole or not there, newest and best kept, foreign ones refused."""

import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_lars import checkpoint
from dist_lars.config import Config
from dist_lars.errors import UserError
from dist_lars.rundir import open_run_dir, write_config


def save(folder, step, best=False, keep=2, **more):
    return checkpoint.save(folder, {"step": step, **more}, best=best, keep=keep)


def test_latest_best_and_the_newest_k_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        save(folder, step, best=step == 2)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["best", "latest", *(f"step-{s:09d}.pt" for s in (2, 4, 5))]
    assert checkpoint.find(tmp_path) == folder / "step-000000005.pt"
    assert checkpoint.load(checkpoint.pointed_at(folder, "best"))["step"] == 2
    assert checkpoint.load(tmp_path)["step"] == 5  # a run directory stands for its latest
    assert {name: checkpoint.load(folder / name)["step"] for name in ("latest", "best")} == {"latest": 5, "best": 2}
    with pytest.raises(UserError, match="checkpoint .*nothing/best does not exist"):
        checkpoint.load(tmp_path / "nothing" / "best")


def test_a_run_that_was_killed_before_its_first_checkpoint_is_a_run(tmp_path):
    """Its log would have lines of two runs."""
    first = Config(run_dir=str(tmp_path))
    open_run_dir(first)[1].close()
    write_config(first, tmp_path)
    open_run_dir(replace(first, seed=1))[1].close()  # nothing was done there yet
    write_config(replace(first, seed=1), tmp_path)
    (tmp_path / "log.jsonl").write_text('{"kind": "start"}\n')
    with pytest.raises(UserError, match="holds another run .seed: 1 -> 0."):
        open_run_dir(first)
    open_run_dir(replace(first, seed=1))[1].close()


def test_weights_are_read_from_a_pointer_too(tmp_path):
    save(tmp_path / "checkpoints", 1, best=True, model={"w": torch.ones(2)})
    save(tmp_path / "checkpoints", 2, model={"w": torch.zeros(2)})
    assert checkpoint.read_weights(tmp_path / "checkpoints" / "best")["w"].tolist() == [1, 1]


def test_a_crash_while_saving_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, 1)

    def torn(state, file):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(torch, "save", torn)
        with pytest.raises(OSError, match="disk full"):
            save(folder, 2)
    assert checkpoint.load(tmp_path)["step"] == 1
    save(folder, 3)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]  # the leftover is gone


def test_a_crash_between_file_and_pointer_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write_aside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save(folder, 2)
    assert checkpoint.load(tmp_path)["step"] == 1


def test_files_reach_the_disk_before_their_names(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda a, b: (events.append(f"rename {b.name}"), real_replace(a, b))[1]
    )
    save(tmp_path, 7)
    assert events == ["fsync", "rename step-000000007.pt", "fsync", "fsync", "rename latest"]


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "evil.pt").write_bytes(checkpoint.to_bytes({"x": Evil()}))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    whole = save(tmp_path, 1)
    (tmp_path / "old.pt").write_bytes(checkpoint.to_bytes({"format": 0}))
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:300])
    for name, message in {
        "text.pt": "is damaged, or not one of ours",
        "half.pt": "is damaged",
        "list.pt": "not one of ours",
        "old.pt": "has format 0, this version of dist_lars reads 1",
        "none.pt": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            checkpoint.load(tmp_path / name)
    with pytest.raises(UserError, match="holds no checkpoint"):
        (tmp_path / "empty").mkdir()
        checkpoint.load(tmp_path / "empty")


def test_weights_of_another_model_are_named():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"x.pt is of another model: 1 of 2 tensors differ, first weight: \(2, 4\)"):
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "x.pt")
    with pytest.raises(UserError, match="first extra: .* absent in the model"):
        checkpoint.load_weights(model, {**model.state_dict(), "extra": torch.zeros(1)}, "x.pt")


def test_other_tools_can_read_it(tmp_path):
    path = save(tmp_path, 3, model={"w": torch.ones(2)})
    assert torch.load(path, weights_only=True)["model"]["w"].tolist() == [1, 1]
    assert subprocess.run(["python3", "-m", "zipfile", "-t", str(path)], check=False).returncode == 0


def test_every_flipped_byte_is_noticed(tmp_path):
    data = save(tmp_path, 3, model={"w": torch.arange(40.0)}).read_bytes()
    assert checkpoint.verify(data)
    rng = np.random.RandomState(0)
    ends = [0, 1, 30, 60, len(data) - 1, len(data) - 40, len(data) - 72, len(data) - 73, len(data) - 80]
    for at in [*ends, *rng.randint(0, len(data), 300)]:
        broken = bytearray(data)
        broken[at] ^= 1 << rng.randint(8)
        assert not checkpoint.verify(bytes(broken)), at
    for size in [0, 1, 70, 80, len(data) // 2, len(data) - 1]:
        assert not checkpoint.verify(data[:size])
    assert not checkpoint.verify(data + b"x")


def test_the_newest_good_one_is_found(tmp_path):
    folder = tmp_path / "checkpoints"
    paths = [save(folder, step, keep=9) for step in (1, 2, 3)]
    assert checkpoint.newest_good(tmp_path) == (paths[2], [])
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    paths[1].write_bytes(b"")
    assert checkpoint.newest_good(tmp_path) == (paths[0], [paths[2], paths[1]])
    (folder / "step-000000004.pt").mkdir()  # reading it is an error of the system's, as on a sick disk
    assert checkpoint.newest_good(tmp_path) == (paths[0], [folder / "step-000000004.pt", paths[2], paths[1]])
    paths[0].unlink()
    assert checkpoint.newest_good(tmp_path)[0] is None
