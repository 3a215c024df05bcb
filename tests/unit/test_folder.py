"""Image folders: listed once and sorted; what is missing or broken is refused by name."""

import os
import pickle
import shutil
import time

import numpy as np
import pytest

from dist_lars.data import folder as room
from dist_lars.data import folder_sets, list_folders, synthetic_sets
from dist_lars.data.folder import index_folder
from dist_lars.data.loader import TrainOrder, batches
from dist_lars.data.synthetic import digits_folder
from dist_lars.errors import UserError
from tests.conftest import kept


def sets_of(path):
    return folder_sets(*list_folders(str(path), None), seed=0, image_size=16, resize=20, min_scale=0.5, flip=True)


def test_index_is_sorted_and_compact(image_folder):
    train, val = list_folders(str(image_folder), None)
    assert (len(train), len(val), train.classes) == (24, 11, ("class0", "class1", "class2"))
    assert train.labels.tolist() == sorted(train.labels.tolist())
    assert [train.path(i).split("/")[-1] for i in (0, 1, 23)] == ["000.jpg", "003.jpg", "023.jpg"]
    assert pickle.loads(pickle.dumps(train)).path(5) == train.path(5)


def test_items_are_pixels_and_labels(image_folder):
    sets = sets_of(image_folder)
    pixels, label = sets.train[0, 23]
    assert (pixels.shape, pixels.dtype, label) == ((16, 16, 3), np.uint8, 2)
    assert not np.array_equal(pixels, sets.train[1, 23][0])  # another epoch, another crop
    assert np.array_equal(sets.val[0, 3][0], sets.val[7, 3][0])


def test_validation_may_lie_in_test_or_elsewhere(image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "train")
    with pytest.raises(
        UserError, match=r"no validation folder: looked for .*/val and .*/test; name one with --data.val"
    ):
        list_folders(str(tmp_path), None)
    shutil.copytree(image_folder / "val", tmp_path / "test")
    assert len(list_folders(str(tmp_path), None)[1]) == 11
    assert len(list_folders(str(tmp_path), str(image_folder / "train"))[1]) == 24


def test_deeper_folders_and_foreign_files(tmp_path):
    for name in ("a/x.JPG", "a/deep/y.png", "a/notes.txt", "b/z.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    index = index_folder(str(tmp_path))
    assert [index.path(i).removeprefix(str(tmp_path)) for i in range(3)] == ["/a/deep/y.png", "/a/x.JPG", "/b/z.jpeg"]


def test_names_that_are_not_ascii(tmp_path):
    (tmp_path / "Käfer").mkdir()
    (tmp_path / "Käfer" / "größe 1.jpg").write_bytes(b"")
    index = index_folder(str(tmp_path))
    assert index.path(0) == str(tmp_path / "Käfer" / "größe 1.jpg")


def test_what_is_missing_is_named(tmp_path, image_folder):
    with pytest.raises(UserError, match="does not exist"):
        index_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has no class folders"):
        index_folder(str(tmp_path))
    with pytest.raises(UserError, match=r"has no train/ folder; expected .*/train/CLASS/image.jpg"):
        list_folders(str(tmp_path), None)
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="class folder .*empty holds no images"):
        list_folders(str(tmp_path), str(image_folder / "val"))


def test_classes_that_differ_are_named(tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "d")
    (tmp_path / "d" / "val" / "class2").rename(tmp_path / "d" / "val" / "klass2")
    with pytest.raises(UserError, match=r"only in .*/train: class2; only in .*/val: klass2"):
        list_folders(str(tmp_path / "d"), None)


def test_workers_change_nothing(image_folder):
    sets = sets_of(image_folder)
    order = TrainOrder(24, 0, 0, 1, global_batch=8, micro_batch=4, start=0, stop=6)
    alone, helped = (kept(batches(sets.train, order, workers, pin=False)) for workers in (0, 2))
    assert len(alone) == len(helped) == 12
    assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(alone, helped, strict=True))
    assert alone[0][0].shape == (4, 16, 16, 3)


def test_synthetic_images_are_the_same_everywhere():
    a, b = (synthetic_sets(train=100, val=10, classes=7, image_size=8, seed=3) for _ in range(2))
    assert (len(a.train), len(a.val), len(a.classes)) == (100, 10, 7)
    assert np.array_equal(a.train[0, 99][0], b.train[5, 99][0])
    assert a.train[0, 99][1] == 99 % 7


def test_digits_are_written_once(tmp_path):
    path = digits_folder(str(tmp_path), 8)
    sets = sets_of(path)
    assert (len(sets.train), len(sets.val), len(sets.classes)) == (1500, 297, 10)
    assert digits_folder(str(tmp_path), 8) == path
    assert [p.name for p in tmp_path.iterdir()] == ["digits-8"]  # nothing half-made is left beside it


# --- the list that is kept --------------------------------------------------------------------------------------------


@pytest.fixture
def old_folder(image_folder, tmp_path):
    """A copy of the training images whose folders changed an hour ago."""
    shutil.copytree(image_folder / "train", tmp_path / "data")
    (tmp_path / "data" / "class0" / "deep").mkdir()
    shutil.copy(tmp_path / "data" / "class0" / "000.jpg", tmp_path / "data" / "class0" / "deep" / "x.jpg")
    for folder in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        if folder.is_dir():
            os.utime(folder, (time.time() - 3600,) * 2)
    return tmp_path / "data"


def test_a_folder_is_listed_once(old_folder, tmp_path, monkeypatch):
    first = index_folder(str(old_folder), str(tmp_path / "cache"))
    assert [p.name.startswith("index-") for p in (tmp_path / "cache").iterdir()] == [True]
    monkeypatch.setattr(room, "list_class", None)  # would fail if it were called
    again = index_folder(str(old_folder), str(tmp_path / "cache"))
    assert (again.root, again.classes, len(again)) == (first.root, first.classes, 25)
    assert [again.path(i) for i in range(25)] == [first.path(i) for i in range(25)]
    assert np.array_equal(again.labels, first.labels)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "class1" / "new.jpg").write_bytes(b""),
        lambda root: (root / "class0" / "deep" / "x.jpg").unlink(),
        lambda root: (root / "class2" / "002.jpg").rename(root / "class2" / "renamed.jpg"),
        lambda root: shutil.copytree(root / "class2", root / "class3"),
    ],
    ids=["added", "removed below", "renamed", "new class"],
)
def test_a_changed_folder_is_listed_again(old_folder, tmp_path, change):
    index_folder(str(old_folder), str(tmp_path / "cache"))
    change(old_folder)
    kept, fresh = index_folder(str(old_folder), str(tmp_path / "cache")), index_folder(str(old_folder))
    assert [kept.path(i) for i in range(len(kept))] == [fresh.path(i) for i in range(len(fresh))]


def test_a_folder_that_changes_this_second_is_not_kept(old_folder, tmp_path):
    os.utime(old_folder / "class1")
    index_folder(str(old_folder), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_spoilt_or_unwritable_cache_does_no_harm(old_folder, tmp_path):
    cache = tmp_path / "cache"
    index_folder(str(old_folder), str(cache))
    (kept,) = cache.iterdir()
    for content in (b"", b"rubbish", kept.read_bytes()[:200]):
        kept.write_bytes(content)
        assert len(index_folder(str(old_folder), str(cache))) == 25
    (tmp_path / "file").write_text("")
    assert len(index_folder(str(old_folder), str(tmp_path / "file" / "cache"))) == 25


def test_links_in_a_circle_end(old_folder):
    (old_folder / "class0" / "up").symlink_to(old_folder)
    assert len(index_folder(str(old_folder))) == 25


def test_an_index_costs_little_memory(tmp_path):
    for c in range(3):
        (tmp_path / f"n0000000{c}").mkdir()
        for i in range(100):
            (tmp_path / f"n0000000{c}" / f"n0000000{c}_{i:05d}.JPEG").touch()
    index = index_folder(str(tmp_path))
    assert index.nbytes / len(index) <= 20 + 8 + 4  # name, where it ends, label
