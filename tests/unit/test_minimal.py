"""The LARS paper's "minimal" augmentation: squeeze to a square, crop at random, mirror."""

from functools import partial

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from dist_lars.data import folder_sets, list_folders
from dist_lars.data.decode import Pixels
from dist_lars.data.transforms import augment_generator, minimal_image

SIZE, RESIZE = 16, 19
IMAGE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 50, 3), dtype=np.uint8))
SQUARE = np.asarray(reference.resize(IMAGE, [RESIZE, RESIZE], InterpolationMode.BILINEAR)).astype(int)


def drawn(index: int, flip: bool, epoch: int = 0) -> np.ndarray:
    rng = augment_generator(0, epoch, index)
    return minimal_image(Pixels(np.array(IMAGE)), rng, SIZE, RESIZE, flip).astype(int)


def place(pixels: np.ndarray) -> tuple[int, int, bool]:
    """Where in torchvision's resized square these pixels lie (to one level of 256), and whether they are mirrored."""
    places = [
        (top, left, mirrored)
        for top in range(RESIZE - SIZE + 1)
        for left in range(RESIZE - SIZE + 1)
        for mirrored in (False, True)
        if np.abs(SQUARE[top : top + SIZE, left : left + SIZE][:, :: -1 if mirrored else 1] - pixels).max() <= 1
    ]
    (found,) = places
    return found


def test_every_crop_of_the_squeezed_image_comes_up_and_half_are_mirrored():
    places = [place(drawn(i, flip=True)) for i in range(200)]
    assert {(top, left) for top, left, _ in places} == {(a, b) for a in range(4) for b in range(4)}
    assert 70 < sum(mirrored for _, _, mirrored in places) < 130
    assert not any(place(drawn(i, flip=False))[2] for i in range(50))


def test_it_is_a_function_of_seed_epoch_and_index():
    assert np.array_equal(drawn(3, True), drawn(3, True))
    assert len({place(drawn(3, True, epoch)) for epoch in range(20)}) > 5


def test_the_option_changes_training_and_not_validation(image_folder):
    indexes = list_folders(str(image_folder), None)
    sets = partial(folder_sets, *indexes, seed=0, image_size=SIZE, resize=RESIZE, min_scale=0.1, flip=True)
    minimal, inception = sets(augment="minimal"), sets(augment="inception")
    assert not np.array_equal(minimal.train[0, 0][0], inception.train[0, 0][0])
    assert np.array_equal(minimal.val[0, 0][0], inception.val[0, 0][0])
