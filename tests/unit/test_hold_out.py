"""A share of the training images, held out to choose options by."""

import numpy as np
import pytest

from dist_lars import data, inputs
from dist_lars.cli import load_config
from dist_lars.comm import LocalComm
from dist_lars.data.index import Index, packed_names
from dist_lars.errors import UserError
from dist_lars.plan import planned_images


def index(n: int, shards: bool = False) -> Index:
    names, ends = packed_names([f"{i}{'x' * (i % 5)}.jpg".encode() for i in range(n)])
    places = np.stack([np.arange(n) % 3, np.arange(n) * 512, np.arange(n) + 9], 1) if shards else np.empty((0, 3), int)
    labels = np.sort(np.arange(n) % 4).astype(np.int32)
    return Index("root", ("a", "b", "c", "d"), labels, names, ends, ("s0", "s1", "s2") if shards else (), places)


@pytest.mark.parametrize("shards", [False, True])
def test_a_subset_is_those_images_in_that_order(shards):
    whole, numbers = index(50, shards), np.array([7, 3, 49, 0, 4])
    part = whole.subset(numbers)
    assert len(part) == 5
    for i, number in enumerate(numbers):
        assert part.name(i) == whole.name(number)
        assert part.labels[i] == whole.labels[number]
        assert part.where(i) == whole.where(number)
        if shards:
            assert part.places[i].tolist() == whole.places[number].tolist()


@pytest.mark.parametrize(("n", "share", "held"), [(1000, 0.1, 100), (7, 0.5, 4), (3, 0.3, 1)])
def test_both_parts_are_the_whole(n, share, held):
    whole = index(n)
    train, val = data.hold_out(whole, share)
    assert (len(train), len(val)) == (n - held, held)
    names = [[part.name(i) for i in range(len(part))] for part in (train, val)]
    assert sorted(names[0] + names[1]) == sorted(whole.name(i) for i in range(n))
    assert train.classes == val.classes == whole.classes


def test_the_share_is_the_same_each_time_and_of_all_classes():
    first, again = (data.hold_out(index(1000), 0.1)[1] for _ in range(2))
    assert [first.name(i) for i in range(100)] == [again.name(i) for i in range(100)]
    assert np.bincount(first.labels, minlength=4).min() >= 10


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(UserError, match="leaves none on one side"):
        data.hold_out(index(100), share)


def test_a_run_trains_on_the_others_and_never_opens_the_validation_images(image_folder):
    options = {"data.path": str(image_folder), "data.hold_out": 0.25, "data.image_size": 32, "data.resize": 32}
    for seed in (0, 1):
        sets = inputs.open_sets(load_config(overrides={**options, "seed": seed}), LocalComm())
        train, val = sets.train.index, sets.val.index
        assert (len(train), len(val)) == (18, 6)
        assert train.root == val.root == str(image_folder / "train")
        assert not {train.name(i) for i in range(18)} & {val.name(i) for i in range(6)}


def test_a_plan_counts_what_is_left():
    options = {"data.train_images": 50_000, "data.val_images": 10_000}
    assert planned_images(load_config(overrides=options)) == (50_000, 10_000)
    assert planned_images(load_config(overrides={**options, "data.hold_out": 0.1})) == (45_000, 5_000)


def test_random_images_cannot_be_held_out():
    with pytest.raises(UserError, match="data.hold_out takes images from a folder"):
        load_config(overrides={"data.kind": "synthetic", "data.hold_out": 0.1})


@pytest.mark.parametrize("kind", ["digits", "synthetic"])
def test_a_folder_that_would_not_be_read_is_refused_from_python_too(kind):
    config = load_config("quickstart", overrides={"data.kind": kind, "data.path": "my/images"})
    with pytest.raises(UserError, match="data.path my/images would not be read: that takes --data.kind folder"):
        inputs.open_sets(config, LocalComm())
