"""Augmentation as torchvision's users know it, but drawn from (seed, epoch, index) and left as uint8.

Pixels are normalised on the device (`normalise`): a quarter of the bytes to move, and one pass over the batch.
"""

import functools
import math
import random

import numpy as np
import torch

from dist_lars.data.decode import Picture, mirrored

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))


def augment_generator(seed: int, epoch: int, index: int) -> random.Random:
    """The random numbers of one image in one epoch; Python promises that this stream never changes."""
    return random.Random(f"{seed}/{epoch}/{index}")


def train_image(picture: Picture, rng: random.Random, size: int, min_scale: float, flip: bool) -> np.ndarray:
    """Random resized crop (bilinear, antialiased) and mirror: uint8 [size, size, 3]."""
    pixels = picture.resized(crop_box(picture.width, picture.height, rng, min_scale), size, size)
    return mirrored(pixels) if flip and rng.random() < 0.5 else pixels


def minimal_image(picture: Picture, rng: random.Random, size: int, resize: int, flip: bool) -> np.ndarray:
    """The LARS paper's "minimal" augmentation: resize to `resize` squared, random crop, mirror: uint8 [size, size, 3].

    The aspect is not kept, as in the paper (arXiv 1708.03888); bilinear and antialiased as everywhere here.
    """
    pixels = picture.resized((0, 0, picture.width, picture.height), resize, resize)
    left, top = rng.randint(0, resize - size), rng.randint(0, resize - size)
    pixels = pixels[top : top + size, left : left + size]
    return mirrored(pixels) if flip and rng.random() < 0.5 else pixels


def crop_box(width: int, height: int, rng: random.Random, min_scale: float) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop with area in [min_scale, 1] and ratio in [3/4, 4/3], log-uniform.

    The rule of torchvision's RandomResizedCrop: ten tries, then the largest central crop within the ratios.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1.0)
        ratio = math.exp(rng.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def val_image(picture: Picture, size: int, resize: int) -> np.ndarray:
    """Shorter side to `resize` (bilinear, antialiased), then the centre crop: uint8 [size, size, 3]."""
    width, height = shorter_side(picture.width, picture.height, resize)
    pixels = picture.resized((0, 0, picture.width, picture.height), width, height)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return pixels[top : top + size, left : left + size]


def shorter_side(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) scaled so that the shorter one is `size`, rounded down as torchvision does."""
    short = min(width, height)
    return width * size // short, height * size // short


def normalise(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in ImageNet's mean and deviation, channels-last in memory without a copy."""
    mean, scale = _mean_and_scale(pixels.device, dtype)
    return pixels.permute(0, 3, 1, 2).to(dtype).sub_(mean).mul_(scale)


@functools.cache
def _mean_and_scale(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """MEAN and 1 / STD for bytes, [1, 3, 1, 1]; made once, since the host waits for such a copy to reach a GPU."""
    mean = torch.tensor(MEAN, device=device, dtype=dtype).mul_(255).view(1, 3, 1, 1)
    scale = torch.tensor(STD, device=device, dtype=dtype).mul_(255).reciprocal_().view(1, 3, 1, 1)
    return mean, scale
