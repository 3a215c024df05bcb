"""The arithmetic of batches: published facts, refusals that help, and the equalities for any numbers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lars.cli import load_config
from dist_lars.config import Config, Schedule
from dist_lars.errors import UserError
from dist_lars.plan import describe, make_plan

IMAGENET = 1_281_167


@pytest.mark.parametrize(("batch", "steps"), [(8192, 156), (16384, 78), (32768, 39)])
def test_steps_per_epoch_of_imagenet(batch, steps):
    plan = make_plan(Config(batch_size=batch), 64, IMAGENET, 50_000)
    assert plan.steps_per_epoch == steps
    assert plan.dropped_images == 3215
    assert plan.total_steps == 90 * steps
    assert plan.rate.warmup_steps == 5 * steps
    assert plan.rate.decay_steps == 85 * steps


def test_accumulation_makes_up_for_missing_ranks():
    plans = {n: make_plan(Config(batch_size=8192, micro_batch=32), n, IMAGENET, 0) for n in (1, 2, 64, 256)}
    assert {n: p.accumulation for n, p in plans.items()} == {1: 256, 2: 128, 64: 4, 256: 1}
    assert len({p.rate for p in plans.values()}) == 1  # the schedule does not know the number of ranks


def test_a_batch_that_does_not_divide_names_the_nearest_choices():
    with pytest.raises(UserError) as e:
        make_plan(Config(batch_size=8192, micro_batch=32), 60, IMAGENET, 0)
    assert str(e.value) == (
        "batch_size 8192 does not divide by 60 ranks x micro_batch 32 (= 1920 images per pass); "
        "nearest: 32 or 64 ranks; --batch_size 7680 or 9600"
    )


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "hint"),
    [(48, 32, 2, "--micro_batch 24"), (64, 32, 4, "nearest: 2 ranks; --micro_batch 16; --batch_size 128")],
)
def test_other_ways_out(batch, micro, ranks, hint):
    with pytest.raises(UserError, match=hint):
        make_plan(Config(batch_size=batch, micro_batch=micro), ranks, IMAGENET, 0)


def test_every_proposed_way_out_is_valid():
    followed = refused = 0
    for batch in range(1, 80):
        for micro in range(1, 12):
            for ranks in range(1, 9):
                try:
                    make_plan(Config(batch_size=batch, micro_batch=micro), ranks, 10_000, 0)
                except UserError as e:
                    refused += 1
                    for way in str(e).split("nearest: ")[1].split("; "):
                        for number in [int(w) for w in way.split() if w.isdigit()]:
                            b = number if "--batch_size" in way else batch
                            m = number if "--micro_batch" in way else micro
                            n = number if "ranks" in way else ranks
                            plan = make_plan(Config(batch_size=b, micro_batch=m), n, 10_000, 0)
                            assert plan.accumulation * m * n == b
                            followed += 1
    assert followed > refused > 1000  # mostly several ways


@pytest.mark.parametrize(
    ("ranks", "images", "way"),
    [
        (1, 100, "--batch_size 96$"),
        (1, 20, "--micro_batch 20 or less and a smaller --batch_size$"),
        (8, 7, "fewer ranks$"),
    ],
)
def test_fewer_images_than_one_batch_is_refused(ranks, images, way):
    with pytest.raises(UserError, match=rf"batch_size 256 is larger than the {images} training images.*{way}"):
        make_plan(Config(), ranks, images, 10)


def test_peak_comes_from_the_rule_or_from_optim_lr():
    linear = Config(batch_size=8192, schedule=Schedule(base_lr=0.1))
    assert make_plan(linear, 64, IMAGENET, 0).rate.peak == pytest.approx(3.2)
    direct = load_config(overrides={"batch_size": 8192, "optim.lr": 10})
    assert make_plan(direct, 64, IMAGENET, 0).rate.peak == 10


def test_a_peak_below_the_start_is_refused():
    with pytest.raises(UserError, match=r"peak learning rate 0\.1 is below schedule\.start_lr 0\.5"):
        make_plan(load_config(overrides={"schedule.start_lr": 0.5}), 1, IMAGENET, 0)


def test_the_plan_as_text_and_as_json():
    plan = make_plan(load_config("resnet18_8k"), 64, IMAGENET, 50_000)
    text = describe(plan).splitlines()
    assert "  peak learning rate: 16 (sqrt: base 2.82843 per 256 images)" in text
    assert "  global batch: 8,192 = 64 ranks x 128 images x 1 passes" in text
    assert json.loads(json.dumps(plan.as_dict()))["peak_lr"] == pytest.approx(16, rel=1e-12)


@given(
    micro=st.integers(1, 64),
    passes=st.integers(1, 16),
    ranks=st.integers(1, 512),
    images=st.integers(1, 3_000_000),
)
def test_equalities_of_every_plan(micro, passes, ranks, images):
    config = Config(batch_size=micro * passes * ranks, micro_batch=micro)
    if images < config.batch_size:
        with pytest.raises(UserError):
            make_plan(config, ranks, images, 0)
        return
    p = make_plan(config, ranks, images, 0)
    assert p.micro_batch * p.accumulation * p.world_size == p.batch_size == config.batch_size
    assert p.local_batch * p.world_size == p.batch_size
    assert p.steps_per_epoch * p.batch_size <= images < (p.steps_per_epoch + 1) * p.batch_size
    assert p.steps_per_epoch * p.batch_size + p.dropped_images == images
