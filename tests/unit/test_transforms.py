"""Augmentation: torchvision's results where the randomness is the same, and a pure function of its keys."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from dist_lars.data.decode import Pixels
from dist_lars.data.transforms import MEAN, STD, augment_generator, crop_box, normalise, train_image, val_image


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(width).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    """Pillow's filter and torch's round differently, by one of 256 levels at most."""
    return got.shape == expected.shape and bool((np.abs(got.astype(int) - expected) <= 1).all())


@pytest.mark.parametrize("flip", [False, True])
def test_training_equals_torchvision_for_the_same_crop(flip):
    image = picture(120, 90)
    for index in range(20):
        left, top, right, bottom = crop_box(120, 90, augment_generator(0, 1, index), 0.08)
        expected = reference.resized_crop(
            image, top, left, bottom - top, right - left, [64, 64], InterpolationMode.BILINEAR
        )
        got = train_image(Pixels(np.asarray(image)), augment_generator(0, 1, index), 64, 0.08, flip)
        mirrored = np.asarray(expected)[:, ::-1]
        assert close(got, np.asarray(expected)) or (flip and close(got, mirrored))


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (64, 64), (300, 65), (72, 72)])
def test_validation_equals_torchvision(size):
    image = picture(*size)
    expected = reference.center_crop(reference.resize(image, 72, InterpolationMode.BILINEAR), [64, 64])
    assert close(val_image(Pixels(np.asarray(image)), 64, 72), np.asarray(expected))


def test_crops_lie_inside_and_keep_area_and_ratio():
    rng = random.Random(0)
    boxes = [crop_box(400, 300, rng, 0.2) for _ in range(500)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        assert 0.19 < (right - left) * (bottom - top) / 120_000 <= 1
        assert 0.74 < (right - left) / (bottom - top) < 1.35
    areas = [(r - x) * (b - y) / 120_000 for x, y, r, b in boxes]
    assert 0.4 < np.mean(areas) < 0.65


def test_a_strip_gets_the_largest_central_crop():
    assert crop_box(1000, 20, random.Random(0), 1.0) == (486, 0, 513, 20)


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    image = Pixels(np.asarray(picture(90, 80)))
    draw = {key: train_image(image, augment_generator(*key), 32, 0.1, True).tobytes() for key in
            [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}  # fmt: skip
    assert len(set(draw.values())) == 4
    assert train_image(image, augment_generator(0, 0, 1), 32, 0.1, True).tobytes() == draw[0, 0, 1]


def test_half_of_the_images_are_mirrored():
    image = Pixels(np.arange(64, dtype=np.uint8).reshape(1, 64, 1).repeat(64, 0).repeat(3, 2))
    mirrored = [
        (a := train_image(image, augment_generator(0, 0, i), 32, 0.9, True))[0, 0, 0] > a[0, -1, 0] for i in range(400)
    ]
    assert 160 < sum(mirrored) < 240


def test_normalise_is_torchvisions_and_channels_last():
    pixels = torch.randint(0, 256, (3, 8, 9, 3), dtype=torch.uint8)
    expected = reference.normalize(pixels.permute(0, 3, 1, 2).float() / 255, MEAN, STD)
    got = normalise(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert normalise(pixels, torch.float64).dtype == torch.float64
