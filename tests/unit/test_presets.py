"""Recipes: every file loads, plans for the cluster it is written for and for one rank, and names its sources."""

import math
import re
import subprocess
import sys

import pytest
import torch
import yaml

from dist_lars import api, models, recipes
from dist_lars.cli import load_config, preset_names, preset_text
from dist_lars.config import LEAVES
from dist_lars.plan import make_plan

# preset -> (ranks that its command starts, peak learning rate, steps per epoch, warm-up steps)
PLANS = {
    "quickstart": (2, None, 7, 7),
    "resnet18_256": (8, 0.1, 5004, 0),
    "resnet18_8k": (64, 16.0, 156, 390),
    "resnet18_16k": (128, 2**4.5, 78, 390),
    "resnet18_32k": (256, 32.0, 39, 546),
    "resnet18_8k_linear": (64, 3.2, 156, 780),
    "resnet50_8k": (128, 17.0, 156, 780),
    "resnet50_32k": (256, 21.2, 39, 624),
    "alexnet_bn_512": (4, 2.0, 2502, 12510),
    "alexnet_bn_8k": (64, 14.0, 156, 780),
    "alexnet_bn_16k": (128, 23.0, 78, 390),
    "alexnet_bn_32k": (256, 22.0, 39, 195),
    "alexnet_8k": (64, 10.0, 156, 312),
    "alexnet_8k_linear": (64, 0.32, 156, 780),
    "cifar10_resnet_256": (2, 0.1, 195, 195),
    "cifar10_resnet_4k": (2, None, 12, 24),
    "cifar10_alexnet_256": (2, None, 195, 195),
    "cifar10_alexnet_4k": (2, None, 12, 24),
}


def plan_of(name: str, ranks: int):
    c = load_config(name)
    return make_plan(c, ranks, c.data.train_images, c.data.val_images)


def test_the_table_names_every_preset():
    assert set(PLANS) == set(preset_names())


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_on_its_cluster(name):
    ranks, peak, steps, warmup = PLANS[name]
    plan = plan_of(name, ranks)
    assert plan.world_size * plan.micro_batch * plan.accumulation == plan.batch_size
    assert plan.accumulation == 1 or name.startswith(("quickstart", "cifar10"))  # those are for a few cores
    assert (plan.steps_per_epoch, plan.rate.warmup_steps) == (steps, warmup)
    if peak is not None:
        assert plan.rate.peak == pytest.approx(peak, rel=1e-12)
    assert plan.rate.warmup_steps + plan.rate.decay_steps == plan.total_steps


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_on_one_rank(name):
    """A batch of 32,768 on a laptop: the same micro-batches, one after the other."""
    alone, cluster = plan_of(name, 1), plan_of(name, PLANS[name][0])
    assert alone.accumulation == cluster.accumulation * cluster.world_size
    assert (alone.micro_batch, alone.rate, alone.total_steps) == (
        cluster.micro_batch,
        cluster.rate,
        cluster.total_steps,
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_quickstart_takes_any_few_ranks(ranks):
    assert plan_of("quickstart", ranks).batch_size % (12 * plan_of("quickstart", ranks).micro_batch) == 0


@pytest.mark.parametrize(("name", "base"), [("resnet18_8k_linear", 0.1), ("alexnet_8k_linear", 0.01)])
def test_the_linear_rule_over_batches(name, base):
    for batch in (256, 1024, 4096, 8192):
        c = load_config(name, overrides={"batch_size": batch})
        assert make_plan(c, 1, 10**6, 1).rate.peak == base * batch / 256  # 3.2 and 0.32 at 8,192
    assert load_config(name).optim.trust_coefficient == 0.001


def test_sgd_scales_by_either_rule():
    for rule, peak in (("linear", 3.2), ("sqrt", 0.1 * math.sqrt(32))):
        c = load_config("resnet18_256", overrides={"batch_size": 8192, "schedule.scaling": rule})
        assert make_plan(c, 64, 10**6, 1).rate.peak == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_the_header_says_what_a_user_needs(name):
    words = recipes.header(name)
    assert {"command", "source", "accuracy", "measured"} <= set(words)
    (command,) = [line for line in words["command"] if "horovodrun" in line]
    assert f"-np {PLANS[name][0]} " in command
    assert f"--preset {name}" in command or name == "resnet18_8k"  # which is what no arguments mean
    assert re.search(r"arXiv \d{4}\.\d{5}|github\.com|MLPerf|this project", " ".join(words["source"]))
    accuracy = " ".join(words["accuracy"])
    assert "%" in accuracy or "none published" in accuracy or "README" in accuracy
    assert preset_text(name).startswith(f"# {name}: ")
    assert max(map(len, preset_text(name).splitlines())) <= 120


@pytest.mark.parametrize("name", PLANS)
def test_the_file_says_how_it_trains(name):
    """What a recipe stands for is written in it, not left to defaults that may change."""
    raw = yaml.safe_load(preset_text(name))
    assert {"batch_size", "micro_batch", "epochs", "precision", "data", "model", "optim", "schedule"} <= set(raw)
    assert {"name", "weight_decay"} <= set(raw["optim"])
    assert {"warmup_epochs", "decay"} <= set(raw["schedule"])
    assert ("lr" in raw["optim"]) != ("base_lr" in raw["schedule"])
    if raw["optim"]["name"] == "lars":
        assert {"law", "trust_coefficient"} <= set(raw["optim"])
    assert "ema_decay" not in raw["optim"]  # off by default


@pytest.mark.parametrize("name", PLANS)
def test_its_network_builds(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in api.make_model(load_config(name), 10).parameters()) > 70_000


def test_options_reach_the_network():
    assert set(models.OPTIONS) == {k.removeprefix("model.") for k in LEAVES if k.startswith("model.")} - {
        "name", "channels_last", "weights",
    }  # fmt: skip
    c = load_config("resnet18_8k")
    torch.manual_seed(0)
    model = api.make_model(c, 1000)
    assert model.layer1[0].bn2.weight.abs().max() == 0
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_the_list_shows_every_preset_without_torch():
    code = (
        "import sys; from dist_lars.train import main; main(['--list_presets']);"
        "print([m for m in ('torch', 'horovod', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    title, *lines, heavy = done.stdout.strip().splitlines()
    assert heavy == "[]"
    assert title.split() == ["name", "model", "batch", "optimizer", "peak", "LR", "warm-up", "source"]
    assert {line.split()[0] for line in lines} == set(PLANS)
    (row,) = [line for line in lines if line.startswith("resnet50_8k ")]
    words = re.split(r"  +", row)
    assert words[1:6] == ["resnet50", "8,192", "lars, mlperf law", "17", "5 epochs"]
    assert words[6].startswith("MLPerf Training 4.0")
