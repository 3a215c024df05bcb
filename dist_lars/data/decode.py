"""Encoded bytes -> pixels, behind one function: `open_picture`.

JPEGs go through libjpeg-turbo (simplejpeg) and are decoded at 1/2, 1/4 or 1/8 when the crop is to become that much
smaller: the inverse DCT then does most of the shrinking. Everything else, and every JPEG that turbo complains about,
goes through Pillow, whose verdict is final. Without simplejpeg Pillow does it all, with the same scaling.

An EXIF orientation is ignored, as torchvision, timm and DALI do and as ImageNet's published accuracies imply.
"""

import io
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the whole picture

MAX_PIXELS = 178_956_970  # Pillow's limit (at twice of which it refuses): a few bytes may claim to be gigapixels


class BadImage(Exception):  # noqa: N818 - what it is, not that it is an error: often it is skipped
    """Bytes that are no image: which, and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why


class Picture(Protocol):
    """An image of known size, whose pixels are made when the crop is known."""

    @property
    def width(self) -> int:
        """Pixels."""

    @property
    def height(self) -> int:
        """Pixels."""

    def resized(self, box: Box, width: int, height: int) -> np.ndarray:
        """The box, resized: uint8 [height, width, 3]."""


@dataclass(frozen=True)
class Pixels:
    """A decoded image, uint8 [height, width, 3]."""

    pixels: np.ndarray

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    def resized(self, box: Box, width: int, height: int) -> np.ndarray:
        left, top, right, bottom = box
        return resize(self.pixels[top:bottom, left:right], width, height)


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose header alone has been read."""

    data: bytes
    width: int
    height: int

    def resized(self, box: Box, width: int, height: int) -> np.ndarray:
        left, top, right, bottom = box
        part = shrinking((right - left) / width, (bottom - top) / height)
        pixels = _shrunk(self.data, self.width, self.height, part)
        # A pixel of the shrunk picture stands for `part` x `part` of the whole one.
        left, top = round(left / part), round(top / part)
        right, bottom = max(left + 1, round(right / part)), max(top + 1, round(bottom / part))
        return resize(pixels[top:bottom, left:right], width, height)


def open_picture(data: bytes, name: str = "image") -> Picture:
    """The picture in these bytes; raises `BadImage` for bytes that are none. A JPEG's body is read by `resized`."""
    size = _size(data) if data[:2] == b"\xff\xd8" else None
    return Jpeg(data, *size) if size else Pixels(_pillow(data, name))


def _size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that can be decoded at a reduced size; None: leave it to Pillow."""
    try:
        if simplejpeg is None:
            with Image.open(io.BytesIO(data)) as image:
                (width, height), colour = image.size, image.mode
        else:
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    # CMYK is for Pillow, which knows Adobe's inverted one.
    known = colour in ("YCbCr", "RGB", "Gray", "L") and width * height <= MAX_PIXELS
    return (width, height) if known else None


def decode(data: bytes, name: str = "image") -> np.ndarray:
    """The whole image at full size, uint8 [height, width, 3]; raises `BadImage`."""
    picture = open_picture(data, name)
    try:
        return picture.resized((0, 0, picture.width, picture.height), picture.width, picture.height)
    except BadImage as e:
        raise BadImage(name, e.why) from e


def shrinking(horizontal: float, vertical: float) -> int:
    """The largest of 8, 4, 2, 1 that leaves the filter at least as many pixels as it is to make."""
    return next(part for part in (8, 4, 2, 1) if part <= max(1.0, min(horizontal, vertical)))


def _shrunk(data: bytes, width: int, height: int, part: int) -> np.ndarray:
    if simplejpeg is None:
        return _pillow(data, "image", part)
    least = {"min_width": -(-width // part), "min_height": -(-height // part), "min_factor": part} if part > 1 else {}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:  # turbo's strictness is no verdict: Pillow reads files with harmless faults
        return _pillow(data, "image", part)


def _pillow(data: bytes, name: str, part: int = 1) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if part > 1:
                image.draft("RGB", (image.width // part, image.height // part))
            if image.mode.startswith("I"):
                return _sixteen_bits(np.asarray(image))
            return np.array(image.convert("RGB"))
    except Image.UnidentifiedImageError as e:
        raise BadImage(name, "the file is empty" if not data else "no known image format") from e
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError) as e:
        raise BadImage(name, str(e) or type(e).__name__) from e


def _sixteen_bits(pixels: np.ndarray) -> np.ndarray:
    """16-bit gray as 8-bit RGB by its high byte; Pillow's own conversion clips at 255, which makes it white."""
    return np.repeat((np.clip(pixels, 0, 65535) >> 8).astype(np.uint8)[..., None], 3, axis=2)


_bilinear = partial(torch.nn.functional.interpolate, mode="bilinear", antialias=True)


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear and antialiased, uint8 [height, width, 3]: Pillow's filter in torch's AVX2 code, 4 to 6 times faster."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # Batch dimension first, then permute: the other way round torch does not see channels-last, and is slow.
    batch = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    return _bilinear(batch, (height, width))[0].permute(1, 2, 0).numpy()


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """Left and right exchanged; torch copies pixels of three bytes 5 times faster than numpy does."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).flip(1).numpy()
