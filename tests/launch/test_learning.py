"""Every kind of optimizer learns the quickstart's digits, through the trainer itself; `make test` tries LARS only."""

import signal

import pytest

from dist_lars import api, runlog
from dist_lars.cli import load_config
from dist_lars.stopping import SIGNALS

RECIPES = {
    "lars": {"optim.lr": 6.0},
    "lamb": {"optim.lr": 0.02, "optim.weight_decay": 0.01},
    "sgd": {"optim.lr": 1.0},
    "sgd_momentum": {"optim.lr": 0.1},
    "adam": {"optim.lr": 0.003},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Where the digits are written once for this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "lars" else pytest.mark.studies) for n in RECIPES])
def test_it_learns_the_digits(name, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_LARS_CACHE", str(digits))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = load_config(
        "quickstart",
        overrides={
            "model.name": "resnet_small", "data.image_size": 16, "data.resize": 16,
            "batch_size": 32, "micro_batch": 32, "epochs": 5, "optim.name": name,
            "run_dir": str(tmp_path / "run"), "log.tensorboard": False, "log.progress": False, "data.workers": 0,
            "resume.save_epochs": 100, **RECIPES[name],
        },
    )  # fmt: skip
    handlers = [signal.getsignal(number) for number in SIGNALS]
    result = api.train(config)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers  # this process goes on, and may be ended
    assert result.top1 >= 90
    losses = [line["loss"] for line in runlog.read(tmp_path / "run", "train")]
    assert losses[0] > 2  # ln 10 = 2.3: nothing known
    assert losses[-1] < 0.7
