"""CIFAR-10 as an image folder: what torchvision hands over arrives pixel by pixel, or not at all."""

from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from benchmarks.cifar10 import download, write_folder
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


def test_without_internet_the_way_out_is_told(tmp_path):
    def dataset(folder, train, download):  # stands in for torchvision's
        raise URLError("Name or service not known")

    dataset.url, dataset.filename = "https://here/cifar.tar.gz", "cifar.tar.gz"
    with pytest.raises(SystemExit) as ended:
        download(dataset, tmp_path, train=True)
    assert ended.value.code == (
        "error: CIFAR-10 cannot be downloaded from https://here/cifar.tar.gz: Name or service not known; without "
        f"internet put cifar.tar.gz into {tmp_path} and start again"
    )
