"""Image folders in ImageNet's layout, listed once into compact arrays."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dist_lars.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Index:
    """The images below a folder, classes and names sorted: arrays, for a list of a million strings costs 100 MB."""

    root: str
    classes: tuple[str, ...]
    names: np.ndarray  # bytes [n]: file names within the class folder, UTF-8
    labels: np.ndarray  # int32 [n]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """The file of image i."""
        return os.path.join(self.root, self.classes[self.labels[i]], os.fsdecode(self.names[i]))


def index_folder(root: str) -> Index:
    """List ROOT/CLASS/IMAGE; raises `UserError` for a missing or empty folder or a class without images."""
    if not os.path.isdir(root):
        raise UserError(
            f"data folder {root} does not exist; expected ROOT/train/CLASS/image.jpg and ROOT/val/CLASS/..."
        )
    classes = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir()))
    if not classes:
        raise UserError(f"data folder {root} has no class folders; expected {root}/CLASS/image.jpg")
    names: list[bytes] = []
    labels: list[np.ndarray] = []
    for label, name in enumerate(classes):
        found = sorted(os.fsencode(p) for p in _images(os.path.join(root, name)))
        if not found:
            raise UserError(f"class folder {os.path.join(root, name)} holds no images ({' '.join(EXTENSIONS)})")
        names += found
        labels.append(np.full(len(found), label, np.int32))
    return Index(os.path.abspath(root), classes, np.array(names), np.concatenate(labels))


def _images(folder: str) -> list[str]:
    """Image files at any depth below a class folder, relative to it."""
    found = []
    for parent, _, files in os.walk(folder):
        below = os.path.relpath(parent, folder)
        found += [f if below == "." else os.path.join(below, f) for f in files if f.lower().endswith(EXTENSIONS)]
    return found


def split_folders(path: str, val: str | None) -> tuple[str, str]:
    """The training and validation folders below `path`: train/, and `val` or val/ or test/."""
    train = os.path.join(path, "train")
    if not os.path.isdir(train):
        raise UserError(f"{path} has no train/ folder; expected {path}/train/CLASS/image.jpg")
    choices = [val] if val else [os.path.join(path, "val"), os.path.join(path, "test")]
    found = [c for c in choices if os.path.isdir(c)]
    if not found:
        raise UserError(f"no validation folder: looked for {' and '.join(choices)}; name one with --data.val DIR")
    return train, found[0]


def val_folder(path: str) -> str:
    """The folder to evaluate: val/ or test/ below `path`, else `path` itself."""
    below = [os.path.join(path, name) for name in ("val", "test")]
    return next((folder for folder in below if os.path.isdir(folder)), path)


def check_same_classes(train: Index, val: Index) -> None:
    """Refuse validation classes that differ from the training ones: labels would mean different things."""
    if train.classes == val.classes:
        return
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    raise UserError(
        f"training has {len(train.classes)} classes and validation {len(val.classes)}, and they differ: "
        f"only in {train.root}: {_some(only_train)}; only in {val.root}: {_some(only_val)}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def read_image(path: str) -> Image.Image:
    """Decode one file to RGB; an unreadable one is refused by name."""
    try:
        # Path.read_bytes: one open and one read, where Pillow would seek around on a network file system.
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"cannot read image {path}: {e}; remove or replace it") from e


Transform = Callable[[Image.Image, int, int], np.ndarray]  # (image, epoch, index) -> uint8 [H, W, 3]


@dataclass(frozen=True)
class FolderImages:
    """Item (epoch, i) is (uint8 pixels [H, W, 3], label) of image i as augmented in that epoch."""

    index: Index
    transform: Transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        epoch, i = key
        return self.transform(read_image(self.index.path(i)), epoch, i), int(self.index.labels[i])
