"""What is no proper JPEG is decoded or named; what is comes out as torchvision's pipeline has it, within a bound."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from dist_lars.data import decode as room
from dist_lars.data.decode import BadImage, Jpeg, Pixels, decode, mirrored, open_picture, resize, shrinking
from dist_lars.data.transforms import augment_generator, crop_box


def smooth(width: int, height: int, mode: str = "RGB", cell: int = 16) -> Image.Image:
    """Coloured clouds: like photographs, little at high frequencies."""
    small = np.random.RandomState(width).randint(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(params=["turbo", "pillow"])
def decoder(request, monkeypatch):
    """Every test with it holds for both decoders."""
    if request.param == "pillow":
        monkeypatch.setattr(room, "simplejpeg", None)
    elif room.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    return encoded(smooth(40, 24), exif=exif)


CORPUS = {
    "jpeg": (encoded(smooth(40, 24)), smooth(40, 24), 6),
    "gray": (encoded(smooth(40, 24, "L")), smooth(40, 24, "L"), 6),
    "cmyk": (encoded(smooth(40, 24, "CMYK")), smooth(40, 24), 8),
    "progressive": (encoded(smooth(40, 24), progressive=True), smooth(40, 24), 6),
    "trailing rubbish": (encoded(smooth(40, 24)) + b"rubbish", smooth(40, 24), 6),
    "png": (encoded(smooth(40, 24), "PNG"), smooth(40, 24), 0),
    "rgba": (encoded(smooth(40, 24, "RGBA"), "PNG"), smooth(40, 24), 0),
    "palette": (encoded(smooth(40, 24).quantize(16), "PNG"), smooth(40, 24).quantize(16), 0),
    **({"webp": (encoded(smooth(40, 24), "WEBP", lossless=True), smooth(40, 24), 0)} if features.check("webp") else {}),
    "exif-rotated": (rotated(), smooth(40, 24), 6),  # as torchvision reads it: not turned
    "16-bit gray": (
        encoded(Image.fromarray(np.asarray(smooth(40, 24, "L")).astype(np.uint16) * 257), "PNG"),
        smooth(40, 24, "L"),
        0,
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_odd_files_are_decoded(decoder, name):
    data, image, tolerance = CORPUS[name]
    got = decode(data)
    assert (got.shape, got.dtype) == ((24, 40, 3), np.uint8)
    assert np.abs(got.astype(int) - np.asarray(image.convert("RGB"))).mean() <= tolerance


BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"not found", "no known image format"),
    "head only": (b"\xff\xd8\xff\xe0 half a header", None),
    "truncated jpeg": (encoded(smooth(200, 150))[:2000], "truncated"),
    "truncated png": (encoded(smooth(200, 150), "PNG")[:2000], None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(decoder, name):
    data, why = BROKEN[name]
    with pytest.raises(BadImage, match=why) as caught:
        decode(data, "a/b.jpg")
    assert caught.value.name == "a/b.jpg"
    with pytest.raises(BadImage):
        picture = open_picture(data)
        picture.resized((0, 0, picture.width, picture.height), 16, 16)


def test_gigapixels_in_a_few_bytes_are_refused(decoder):
    data = bytearray(encoded(smooth(40, 24)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500
    with pytest.raises(BadImage, match="decompression bomb"):
        decode(bytes(data))


def torchvisions(data: bytes, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    left, top, right, bottom = box
    image = Image.open(io.BytesIO(data)).convert("RGB")
    cropped = reference.resized_crop(
        image, top, left, bottom - top, right - left, [size] * 2, InterpolationMode.BILINEAR
    )
    return np.asarray(cropped).astype(int)


def differences(images: list[bytes], size: int) -> list[float]:
    found = []
    for i, data in enumerate(images):
        picture = open_picture(data)
        box = crop_box(picture.width, picture.height, augment_generator(0, 0, i), 0.08)
        got = picture.resized(box, size, size)
        found.append(np.abs(got.astype(int) - torchvisions(data, box, size)).mean())
    return found


def test_crops_are_torchvisions_within_a_bound(decoder):
    images = [encoded(smooth(500 + i, 375, cell=64), quality=92) for i in range(12)]
    assert np.mean(differences(images, 224)) < 0.1  # no crop is shrunk by the DCT
    for size in (96, 48, 24):  # by 2, 4, 8: the crop's edges move by half a shrunk pixel at most
        assert np.mean(differences(images, size)) < 3.5, size


def test_crops_of_photographs_are_torchvisions_within_a_bound(decoder):
    samples = os.environ.get("DIST_LARS_SAMPLES")
    if not samples:
        pytest.skip("DIST_LARS_SAMPLES names no folder with imagenet_sample.tar")
    with tarfile.open(Path(samples) / "imagenet_sample.tar") as tar:
        images = [tar.extractfile(m).read() for m in tar.getmembers()[:40] if m.isfile()]
    found = differences(images, 224)
    assert np.mean(found) < 0.4
    assert np.max(found) < 5


def test_the_size_of_the_crop_decides_how_much_is_decoded():
    assert [shrinking(h, v) for h, v in ((0.5, 3), (1.99, 9), (2, 2), (3.9, 5), (4, 4), (100, 8))] == [1, 1, 2, 2, 4, 8]


def test_shrunk_jpegs_cover_the_same_scene(decoder):
    # A bright right half must stay where it is, whatever scale the crop is decoded at.
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:, 300:] = 255
    picture = open_picture(encoded(Image.fromarray(pixels)))
    for size in (300, 150, 75, 30):
        row = picture.resized((150, 100, 450, 250), 2 * size, size)[size // 2, :, 0].astype(int)
        edge = int(np.argmax(row > 127))
        assert abs(edge - size) <= 1 + size // 20, size


@pytest.mark.skipif(room.simplejpeg is None, reason="simplejpeg is not installed")
def test_jpegs_are_opened_by_their_header_alone():
    picture = open_picture(encoded(smooth(200, 150))[:3000])
    assert isinstance(picture, Jpeg)
    assert (picture.width, picture.height) == (200, 150)
    assert isinstance(open_picture(CORPUS["cmyk"][0]), Pixels)


def test_resizing_is_pillows_within_one_level():
    image = smooth(130, 90)
    for width, height in ((64, 64), (200, 150), (131, 20), (1, 1)):
        expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(resize(np.asarray(image).copy(), width, height) - expected).max() <= 1


def test_mirrored_is_numpys():
    pixels = np.asarray(smooth(33, 20)).copy()
    assert np.array_equal(mirrored(pixels), pixels[:, ::-1])
