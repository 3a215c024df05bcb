"""Images: where they lie, in which order they are seen, how they are augmented and batched."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from dist_lars.data.folder import FolderImages, Index, check_same_classes, index_folder, split_folders, val_folder
from dist_lars.data.loader import TrainOrder, ValOrder, batches
from dist_lars.data.order import permutation, shard_indices, validation_range
from dist_lars.data.synthetic import SyntheticImages, cache_dir, digits_folder
from dist_lars.data.transforms import augment_generator, minimal_image, train_image, val_image

__all__ = [
    "Index",
    "Sets",
    "TrainOrder",
    "ValOrder",
    "batches",
    "cache_dir",
    "digits_folder",
    "folder_sets",
    "list_folders",
    "permutation",
    "shard_indices",
    "synthetic_sets",
    "index_folder",
    "val_folder",
    "val_images",
    "validation_range",
]


@dataclass(frozen=True)
class Sets:
    """Training and validation images, and the names of their classes in order of label."""

    train: FolderImages | SyntheticImages
    val: FolderImages | SyntheticImages
    classes: tuple[str, ...]


def list_folders(path: str, val: str | None) -> tuple[Index, Index]:
    """List PATH/train and the validation folder; slow on a parallel file system, so call it on one rank."""
    train_folder, val_folder = split_folders(path, val)
    train, validation = index_folder(train_folder), index_folder(val_folder)
    check_same_classes(train, validation)
    return train, validation


def folder_sets(
    train: Index, val: Index, *, seed: int, image_size: int, resize: int, min_scale: float, flip: bool,
    augment: str = "inception",
) -> Sets:  # fmt: skip
    """The images of two listed folders, augmented for training as a function of (seed, epoch, index)."""
    transform = {
        "inception": partial(train_image, size=image_size, min_scale=min_scale, flip=flip),
        "minimal": partial(minimal_image, size=image_size, resize=resize, flip=flip),
    }[augment]
    augmented = partial(_augment, seed=seed, transform=transform)
    return Sets(FolderImages(train, augmented), val_images(val, image_size, resize), train.classes)


def val_images(index: Index, image_size: int, resize: int) -> FolderImages:
    """Images as they are evaluated: resized, cropped from the centre."""
    return FolderImages(index, partial(_centre, size=image_size, resize=resize))


def synthetic_sets(*, train: int, val: int, classes: int, image_size: int, seed: int) -> Sets:
    """Random images that need no files."""
    names = tuple(f"class{i}" for i in range(classes))
    make = partial(SyntheticImages, classes=classes, size=image_size, seed=seed)
    return Sets(make(train), make(val), names)


def _augment(
    image: Image.Image, epoch: int, index: int, *, seed: int, transform: Callable[..., np.ndarray]
) -> np.ndarray:
    return transform(image, augment_generator(seed, epoch, index))


def _centre(image: Image.Image, epoch: int, index: int, *, size: int, resize: int) -> np.ndarray:
    return val_image(image, size, resize)
