"""CIFAR-10 as an image folder: what torchvision hands over arrives pixel by pixel, or not at all."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.cifar10 import write_folder
from dist_lars.data.folder import index_folder

PIXELS = [np.random.RandomState(i).randint(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(4)]
IMAGES = [(Image.fromarray(pixels), i % 2) for i, pixels in enumerate(PIXELS)]  # stands in for the download


def test_images_arrive_under_their_class(tmp_path):
    write_folder(IMAGES, ["cat", "dog"], tmp_path / "train")
    index = index_folder(str(tmp_path / "train"))
    assert index.classes == ("cat", "dog")
    assert list(index.labels) == [0, 0, 1, 1]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "train/dog/00003.png")), PIXELS[3])


def test_an_interrupted_writing_leaves_no_folder(tmp_path):
    with pytest.raises(IndexError):
        write_folder(IMAGES, ["cat"], tmp_path / "train")
    assert not (tmp_path / "train").exists()
    write_folder(IMAGES, ["cat", "dog"], tmp_path / "train")
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["cat", "dog"]
