"""`model.weights` starts a run from a file, and only its start."""

import signal

import pytest
import torch

from dist_lars import api, checkpoint
from dist_lars.cli import load_config
from dist_lars.errors import UserError
from dist_lars.stopping import SIGNALS

SMALL = {
    "data.kind": "synthetic", "data.image_size": 16, "data.resize": 16, "data.train_images": 16, "data.val_images": 8,
    "data.classes": 3, "data.workers": 0, "model.name": "cnn_small", "epochs": 2, "batch_size": 8, "micro_batch": 8,
    "schedule.warmup_epochs": 0, "log.tensorboard": False, "log.progress": False,
}  # fmt: skip


def run(folder, **more):
    return api.train(load_config(overrides={**SMALL, "run_dir": str(folder), **more}))


def weights(folder) -> torch.Tensor:
    return torch.cat([v.flatten() for v in checkpoint.load(folder)["model"].values()])


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    run(tmp_path / "a", **{"optim.lr": 20.0, "seed": 1})
    still = {"optim.lr": 1e-12, "seed": 2}
    run(tmp_path / "fresh", **still)
    run(tmp_path / "b", **still, **{"model.weights": str(tmp_path / "a")})
    assert torch.equal(weights(tmp_path / "b"), weights(tmp_path / "a"))
    assert not torch.allclose(weights(tmp_path / "fresh"), weights(tmp_path / "a"))


def test_a_resumed_run_does_not_start_again(tmp_path):
    run(tmp_path / "a", **{"optim.lr": 20.0})
    torch.save(checkpoint.load(tmp_path / "a")["model"], tmp_path / "start.pt")
    options = {"optim.lr": 20.0, "model.weights": str(tmp_path / "start.pt")}
    run(tmp_path / "b", **options)
    trained = weights(tmp_path / "b")
    (tmp_path / "start.pt").unlink()
    run(tmp_path / "b", **options)  # continues at its end: the file is not needed any more
    assert torch.equal(weights(tmp_path / "b"), trained)


def test_a_start_that_was_refused_leaves_no_run_behind(tmp_path):
    """The command with the spelling corrected is another one, and may use the same directory."""
    for option in ("model.weights", "resume.from"):
        with pytest.raises(UserError, match="nowhere.pt does not exist"):
            run(tmp_path / option, **{option: str(tmp_path / "nowhere.pt")})
        run(tmp_path / option, epochs=1)
        with pytest.raises(UserError, match="holds another run"):
            run(tmp_path / option, epochs=2)


@pytest.mark.parametrize("option", ["resume.from", "optim.lr"])
def test_a_run_that_was_refused_holds_neither_directory_nor_signals(tmp_path, option):
    """A notebook keeps the exception, with all that its frames hold, and tries again."""
    if option == "optim.lr":
        run(tmp_path, epochs=1)
    before = [signal.getsignal(number) for number in SIGNALS]
    value = {"resume.from": str(tmp_path / "nowhere.pt"), "optim.lr": 9.0}[option]
    with pytest.raises(UserError, match="does not exist|holds another run") as kept:
        run(tmp_path, epochs=1, **{option: value})
    assert [signal.getsignal(number) for number in SIGNALS] == before
    run(tmp_path, epochs=1)
    assert kept.tb


@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_tries_its_algorithms_out_unless_runs_must_repeat(tmp_path, monkeypatch, deterministic):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    run(tmp_path / "a", epochs=1, **{"comm.deterministic": deterministic})
    assert torch.backends.cudnn.benchmark is not deterministic


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"workers": -1}])
def test_evaluation_refuses_numbers_that_cannot_be(wrong, image_folder):
    with pytest.raises(UserError, match="but they must be at least 1 and zero or more"):
        api.evaluate(torch.nn.Flatten(), str(image_folder), **wrong)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_a_model_in_its_mode(image_folder, training):
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    model.train(training)
    api.evaluate(model, str(image_folder), workers=0, image_size=8, resize=8)
    assert model.training is training


def test_what_a_result_names_can_be_evaluated(image_folder, tmp_path):
    result = run(tmp_path / "a", **{"data.kind": "folder", "data.path": str(image_folder), "epochs": 1})
    assert result.checkpoint.endswith("checkpoints/latest")
    loss, top1, top5 = api.evaluate(result.checkpoint, str(image_folder), workers=0)
    assert (loss, top1, top5) == pytest.approx((result.loss, result.top1, result.top5))


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="model.weights: .*nowhere.pt does not exist"):
        run(tmp_path / "a", **{"model.weights": str(tmp_path / "nowhere.pt")})
