"""What a run keeps as its best, what it leaves behind when it is refused, and what another may continue."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_lars import api, checkpoint, engine, runlog
from dist_lars.cli import load_config
from dist_lars.config import Config, Resume
from dist_lars.errors import UserError
from dist_lars.guards import Diverged
from dist_lars.run import Result
from dist_lars.rundir import resume_path

SMALL = {
    "data.kind": "synthetic", "data.image_size": 16, "data.resize": 16, "data.train_images": 16, "data.val_images": 8,
    "data.classes": 3, "data.workers": 0, "model.name": "cnn_small", "epochs": 1, "batch_size": 8, "micro_batch": 8,
    "schedule.warmup_epochs": 0, "log.tensorboard": False, "log.progress": False,
}  # fmt: skip
STEPS = 2  # per epoch


def run(folder, **more) -> Result:
    return api.train(load_config(overrides={**SMALL, "run_dir": str(folder), **more}))


def best_epoch(folder) -> int:
    return checkpoint.load(folder / "checkpoints" / "best")["step"] // STEPS


@pytest.fixture
def scored(monkeypatch):
    """`scored(70, 69)`: what the evaluations will find, one after another."""

    def let(*top1: float) -> None:
        found = iter([{"loss": 1.0, "top1": value, "top5": 100.0, "count": 8} for value in top1])
        monkeypatch.setattr(engine, "evaluate", lambda *_, **__: next(found))

    return let


def test_the_best_is_a_checkpoint_that_exists(scored, tmp_path):
    """Only evaluated weights that are saved can be the best: better ones between two saves are gone."""
    scored(70, 68, 71, 69, 72, 60)
    result = run(tmp_path, epochs=6, **{"resume.save_epochs": 2, "resume.keep": 1})
    assert (result.best_top1, best_epoch(tmp_path)) == (69, 4)
    assert [line["saved"] for line in runlog.read(tmp_path, "eval")] == [False, True] * 3
    scored(60)
    assert run(tmp_path, epochs=6, **{"resume.save_epochs": 2, "resume.keep": 1}).best_top1 == 69  # begun again: ended


def test_any_reason_to_save_will_do(scored, tmp_path):
    scored(70, 69, 60)
    result = run(tmp_path, epochs=3, **{"resume.save_epochs": 100, "resume.save_steps": STEPS})
    assert (result.best_top1, best_epoch(tmp_path)) == (70, 1)


def test_a_best_that_could_not_be_written_is_none(scored, tmp_path, monkeypatch):
    save = checkpoint.save

    def full(folder, state, **options):
        if state["step"] == 2 * STEPS:
            raise OSError(28, "No space left on device")
        return save(folder, state, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    scored(50, 70, 69, 60)
    result = run(tmp_path, epochs=4)
    assert (result.best_top1, best_epoch(tmp_path)) == (69, 3)


def test_what_cannot_be_continued_leaves_the_run_as_it_was(tmp_path):
    """The command that began it goes on as if the other had not been tried."""
    run(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="cannot be continued with optim.name lars -> adam"):
        run(tmp_path, **{"optim.name": "adam", "resume.allow": ["optim.name"]})
    assert (tmp_path / "config.yaml").read_bytes() == before
    run(tmp_path)


def test_allowed_differences_are_those_of_the_run_from_then_on(tmp_path):
    run(tmp_path)
    run(tmp_path, **{"optim.momentum": 0.5, "resume.allow": ["optim.momentum"]})
    assert "momentum: 0.5" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="holds another run .optim.momentum: 0.5 -> 0.9."):
        run(tmp_path)


def test_a_job_that_goes_on_after_a_failure_says_so(tmp_path, monkeypatch):
    def broken(*_):
        raise Diverged("once")

    with monkeypatch.context() as m:
        m.setattr(engine, "train_step", broken)
        with pytest.raises(Diverged):
            run(tmp_path)
    assert runlog.read_status(tmp_path)["state"] == "failed"
    run(tmp_path)
    assert runlog.read_status(tmp_path)["state"] == "finished"


@pytest.mark.parametrize("name", ["", "checkpoints/latest", "checkpoints/best", "checkpoints/step-000000001.pt"])
def test_all_ranks_continue_from_the_file_that_rank_0_found(tmp_path, name):
    """That other run may go on saving: a rank that followed the pointer a little later would load another step."""
    other = tmp_path / "other"
    for step in (1, 2):
        checkpoint.save(other / "checkpoints", {"step": step}, best=step == 1, keep=2)
    step = 2 if name in ("", "checkpoints/latest") else 1
    config = replace(Config(), resume=Resume(start=str(other / name)))
    found, _ = resume_path(config, tmp_path / "own")
    assert found == str(other / "checkpoints" / f"step-{step:09d}.pt")
    with pytest.raises(UserError, match="does not exist"):
        resume_path(replace(config, resume=Resume(start=str(Path(found).with_name("step-9.pt")))), tmp_path / "own")
