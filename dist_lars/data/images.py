"""One image at a time: read, decoded, augmented."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_lars.data.cache import Held
from dist_lars.data.decode import BadImage, Picture, open_picture
from dist_lars.data.index import Index

Transform = Callable[[Picture, int, int], np.ndarray]  # (picture, epoch, index) -> uint8 [H, W, 3]


@dataclass(frozen=True)
class Images:
    """Item (epoch, i) is (uint8 pixels [H, W, 3], label) of image i as augmented in that epoch.

    Raises `BadImage` with the file's name for one that cannot be read; the loader decides what follows.
    """

    index: Index
    transform: Transform
    held: Held | None = None  # the images in memory
    on_error: Literal["fail", "replace", "leave_out"] = "fail"  # what the loader does about a file that is no image
    max_skipped: int = 0
    remember: bool = False  # keep finished batches: for images that are the same every time

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        epoch, i = key
        try:
            picture = self.held.picture(i) if self.held else open_picture(self.index.read(i))
            return self.transform(picture, epoch, i), int(self.index.labels[i])
        except BadImage as e:
            raise BadImage(self.index.where(i), e.why) from e
