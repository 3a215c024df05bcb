"""`python -m benchmarks.cifar10 DIR`: CIFAR-10 as an image folder for the studies, DIR/train/CLASS and DIR/val/CLASS.

torchvision downloads it (170 MB) into DIR/.download and checks it; the 60,000 images become PNG files, 150 MB, pixel by
pixel those of the original.
"""

import argparse
import shutil
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

from PIL.Image import Image
from tqdm import tqdm


def write_folder(images: Iterable[tuple[Image, int]], classes: list[str], folder: Path) -> None:
    """FOLDER/CLASS/00000.png and so on, numbered as they come; the folder appears when it is complete."""
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of a writing that was interrupted
    for name in classes:
        (aside / name).mkdir(parents=True)
    for number, (image, label) in enumerate(images):
        image.save(aside / classes[label] / f"{number:05}.png")
    aside.rename(folder)


def download(dataset: Any, folder: Path, train: bool) -> Any:
    """Torchvision's dataset, or its way to go without internet."""
    try:
        return dataset(str(folder), train=train, download=True)
    except (URLError, ConnectionError, TimeoutError, HTTPException, RuntimeError) as e:  # RuntimeError: a damaged file
        raise SystemExit(
            f"error: CIFAR-10 cannot be downloaded from {dataset.url}: {getattr(e, 'reason', e)}; without internet put "
            f"{dataset.filename} into {folder} and start again"
        ) from None


def main() -> None:
    """Download, and write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR")
    folder = parser.parse_args().dir
    from torchvision.datasets import CIFAR10

    for name in ("train", "val"):
        if not (folder / name).exists():
            images = download(CIFAR10, folder / ".download", name == "train")
            write_folder(tqdm(images, name, unit="image"), images.classes, folder / name)
    print(f"{folder} is ready: --data.path {folder}")


if __name__ == "__main__":
    main()
