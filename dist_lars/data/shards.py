"""Packed shards: tar files of images that are read at random, and that the webdataset library streams too.

FOLDER/shard-000000.tar ...   members 00000042.jpg and 00000042.cls (the label as text), 42 the image's number
FOLDER/index.npz              where each image lies, its label, and its file's name in the image folder
FOLDER/shards.json            classes, counts, options, the shards with sizes and SHA-256, what was skipped and why

The number of an image is its place in the sorted image folder, so an epoch's order is the same from both, unless files
were left out as broken: then those after them move up. In the tar files the images stand in a fixed random order:
whoever streams them from front to back sees all classes.
"""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dist_lars.data.index import ARRAYS, Index
from dist_lars.errors import UserError

FORMAT = 1
META, INDEX, WORK = "shards.json", "index.npz", ".packing"


def is_packed(folder: str) -> bool:
    """Whether a folder holds packed shards, finished or not."""
    return (Path(folder) / META).exists() or (Path(folder) / WORK).is_dir()


def read_meta(folder: str) -> dict[str, Any]:
    """The content of shards.json; raises `UserError` where packing has not finished or another version wrote it."""
    try:
        meta = json.loads((Path(folder) / META).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"the packing of {folder} has not finished: run the same `dist_lars.pack` once more") from e
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {Path(folder) / META}: {e}; pack the images again") from e
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder} is of format {meta.get('format')}, and this version reads {FORMAT}: pack again")
    return meta


def packed_index(folder: str) -> Index:
    """The images of a packed folder; every shard is there and has its size."""
    meta = read_meta(folder)
    check_sizes(folder, meta)
    try:
        with np.load(Path(folder) / INDEX) as content:
            arrays = {name: content[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"cannot read {Path(folder) / INDEX}: {e}; copy or pack the images again") from e
    if len(arrays["labels"]) != meta["images"]:
        raise UserError(f"{folder} lists {len(arrays['labels'])} images and promises {meta['images']}: pack again")
    names = tuple(shard["name"] for shard in meta["shards"])
    return Index(str(Path(folder).absolute()), tuple(meta["classes"]), shards=names, **arrays)


def check_sizes(folder: str, meta: dict[str, Any]) -> None:
    """Refuse a folder where a shard is missing or cut short."""
    for shard in meta["shards"]:
        path = Path(folder) / shard["name"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(f"shard {path} {state}, and should have {shard['bytes']:,}: copy or pack it again")


class Entry(NamedTuple):
    """One image on its way into a shard."""

    number: int
    label: int
    data: bytes
    extension: str  # jpg, png, ...: by content, whatever the file was called


class ShardWriter:
    """One tar file that knows where its images lie and what its SHA-256 is. The same entries give the same bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.position = file, hashlib.sha256(), 0
        self.tar = tarfile.open(fileobj=self, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115
        self.numbers: list[int] = []
        self.places: list[tuple[int, int]] = []  # first byte, bytes

    def write(self, data: bytes) -> int:
        """What tarfile calls."""
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        """What tarfile calls."""
        return self.position

    def add(self, entry: Entry) -> None:
        """Append the image and its label."""
        key = f"{entry.number:08d}"
        self._member(f"{key}.{entry.extension}", entry.data)
        size = len(entry.data)
        self.places.append((self.position - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, size))
        self.numbers.append(entry.number)
        self._member(f"{key}.cls", str(entry.label).encode())

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self.tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        """Write the end of the archive and flush it to disk."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())


def room_of(size: int) -> int:
    """Bytes that an image of `size` bytes takes in a shard, with its label and both headers."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 3 * tarfile.BLOCKSIZE


def extension_of(data: bytes) -> str:
    """The usual extension of an image file, told by its first bytes."""
    starts = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif", b"P6": "ppm"}
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in starts.items() if data.startswith(start)), "img")


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
