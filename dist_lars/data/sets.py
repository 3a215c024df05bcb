"""The training and validation images of a run, augmented as its options say."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from dist_lars.data.cache import Held
from dist_lars.data.decode import Picture
from dist_lars.data.folder import check_same_classes, index_folder, split_folders
from dist_lars.data.images import Images
from dist_lars.data.index import Index
from dist_lars.data.order import permutation
from dist_lars.data.shards import is_packed, packed_index
from dist_lars.data.synthetic import SyntheticImages
from dist_lars.data.transforms import augment_generator, minimal_image, train_image, val_image
from dist_lars.errors import UserError


@dataclass(frozen=True)
class Sets:
    """Training and validation images, and the names of their classes in order of label."""

    train: Images | SyntheticImages
    val: Images | SyntheticImages
    classes: tuple[str, ...]


def list_folders(path: str, val: str | None, cache: str | None = None) -> tuple[Index, Index]:
    """List PATH/train and the validation folder; slow on a parallel file system, so call it on one rank."""
    train_folder, val_folder = split_folders(path, val)
    train, validation = open_index(train_folder, cache), open_index(val_folder, cache)
    check_same_classes(train, validation)
    return train, validation


def hold_out(train: Index, share: float) -> tuple[Index, Index]:
    """(the other images, this share of them), drawn once for all: a choice made on the share is one choice."""
    order = permutation(len(train), seed=0, epoch=0)
    held = round(share * len(train))
    if not 0 < held < len(train):
        raise UserError(f"data.hold_out {share:g} of {len(train):,} images leaves none on one side")
    return train.subset(np.sort(order[held:])), train.subset(np.sort(order[:held]))


def open_index(folder: str, cache: str | None = None) -> Index:
    """The images of a folder of classes, or of packed shards; raises `UserError` where there are none."""
    return packed_index(folder) if is_packed(folder) else index_folder(folder, cache)


def folder_sets(
    train: Index,
    val: Index,
    *,
    seed: int,
    image_size: int,
    resize: int,
    min_scale: float,
    flip: bool,
    augment: str = "inception",
    held: Held | None = None,
    skip: bool = False,
    max_skipped: int = 0,
    remember: bool = False,
) -> Sets:
    """The images of two indexes, augmented for training as a function of (seed, epoch, index).

    With `skip`, training replaces at most `max_skipped` files that are no images, and validation leaves them out.
    """
    transform = {
        "inception": partial(train_image, size=image_size, min_scale=min_scale, flip=flip),
        "minimal": partial(minimal_image, size=image_size, resize=resize, flip=flip),
    }[augment]
    images = Images(
        train,
        partial(_augment, seed=seed, transform=transform),
        held,
        on_error="replace" if skip else "fail",
        max_skipped=max_skipped,
    )
    left_out = max_skipped if skip else None
    return Sets(images, val_images(val, image_size, resize, left_out, remember), train.classes)


def val_images(
    index: Index, image_size: int, resize: int, max_skipped: int | None = None, remember: bool = False
) -> Images:
    """Images as they are evaluated: resized, cropped from the centre."""
    return Images(
        index,
        partial(_centre, size=image_size, resize=resize),
        on_error="fail" if max_skipped is None else "leave_out",
        max_skipped=max_skipped or 0,
        remember=remember,
    )


def synthetic_sets(*, train: int, val: int, classes: int, image_size: int, seed: int) -> Sets:
    """Random images that need no files."""
    names = tuple(f"class{i}" for i in range(classes))
    make = partial(SyntheticImages, classes=classes, size=image_size, seed=seed)
    return Sets(make(train), make(val), names)


def _augment(
    picture: Picture, epoch: int, index: int, *, seed: int, transform: Callable[..., np.ndarray]
) -> np.ndarray:
    return transform(picture, augment_generator(seed, epoch, index))


def _centre(picture: Picture, epoch: int, index: int, *, size: int, resize: int) -> np.ndarray:
    return val_image(picture, size, resize)
