"""Image folders: listed once and sorted; what is missing or broken is refused by name."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from dist_lars.data import folder_sets, list_folders, synthetic_sets
from dist_lars.data.folder import index_folder
from dist_lars.data.loader import TrainOrder, batches
from dist_lars.data.synthetic import digits_folder
from dist_lars.errors import UserError


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
    alone, helped = (list(batches(sets.train, order, workers, pin=False)) for workers in (0, 2))
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
