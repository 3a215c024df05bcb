"""Image folders in ImageNet's layout, listed once by many threads and remembered."""

# A Path costs ten times a string, and here are a million of them.
# ruff: noqa: PTH100, PTH112, PTH116, PTH118

import contextlib
import hashlib
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_lars.data.index import Index, packed_names
from dist_lars.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
THREADS = 16  # listing waits for the metadata server, not for the processor
SETTLED = 2.0  # seconds: a folder changed more recently may change again within its clock's tick
FORMAT = 1


class Listing(NamedTuple):
    """One class folder: its images at any depth, sorted, and the folders seen with the time of their last change."""

    files: list[bytes]
    folders: list[tuple[str, int]]  # relative to the class folder, nanoseconds


def index_folder(root: str, cache: str | None = None) -> Index:
    """List ROOT/CLASS/IMAGE; raises `UserError` for a missing or empty folder or a class without images.

    With `cache`, a folder, the list is kept there and used again as long as no folder below ROOT has changed: then
    1,000 classes cost 1,000 calls of stat instead of a list of a million entries.
    """
    if not os.path.isdir(root):
        raise UserError(
            f"data folder {root} does not exist; expected ROOT/train/CLASS/image.jpg and ROOT/val/CLASS/..."
        )
    root = os.path.abspath(root)
    kept = Path(cache) / f"index-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz" if cache else None
    return (kept and _recall(kept, root)) or _list(root, kept)


def _list(root: str, kept: Path | None) -> Index:
    began, changed = time.time(), os.stat(root).st_mtime_ns
    with os.scandir(root) as entries:
        classes = tuple(sorted(e.name for e in entries if e.is_dir()))
    if not classes:
        raise UserError(f"data folder {root} has no class folders; expected {root}/CLASS/image.jpg")
    with ThreadPoolExecutor(THREADS) as pool:
        listings = list(pool.map(lambda name: list_class(os.path.join(root, name)), classes))
    for name, listing in zip(classes, listings, strict=True):
        if not listing.files:
            raise UserError(f"class folder {os.path.join(root, name)} holds no images ({' '.join(EXTENSIONS)})")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(x.files) for x in listings])
    names, ends = packed_names([file for listing in listings for file in listing.files])
    index = Index(root, classes, labels, names, ends)
    if kept:
        folders = [(".", changed)]
        folders += [(os.path.join(c, f), t) for c, x in zip(classes, listings, strict=True) for f, t in x.folders]
        _keep(kept, index, folders, began)
    return index


def list_class(folder: str) -> Listing:
    """Everything below one class folder."""
    files: list[bytes] = []
    folders: list[tuple[str, int]] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        place = os.path.join(folder, below)
        folders.append((below, os.stat(place).st_mtime_ns))
        with os.scandir(place) as entries:
            for entry in entries:
                name = os.path.join(below, entry.name)
                if entry.name.lower().endswith(EXTENSIONS):
                    files.append(os.fsencode(name))
                elif entry.is_dir(follow_symlinks=False):  # a link may lead in a circle
                    waiting.append(name)
    return Listing(sorted(files), folders)


# --- the list that was kept -------------------------------------------------------------------------------------------


def _keep(kept: Path, index: Index, folders: list[tuple[str, int]], began: float) -> None:
    """Write the list aside and rename it; a cache that cannot be written is done without."""
    if max(t for _, t in folders) > (began - SETTLED) * 1e9:
        return
    names, ends = packed_names([os.fsencode(f) for f, _ in folders])
    content: dict[str, Any] = {
        "format": np.array([FORMAT]),
        "root": np.frombuffer(os.fsencode(index.root), np.uint8),
        "classes": np.frombuffer(b"\0".join(map(os.fsencode, index.classes)), np.uint8),
        "folders": names,
        "folder_ends": ends,
        "changed": np.array([t for _, t in folders]),
        **index.arrays(),
    }
    aside = kept.with_name(f".{kept.name}.{os.getpid()}.npz")
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside, **content)
        aside.replace(kept)


def _recall(kept: Path, root: str) -> Index | None:
    """The index that was kept, if it is of this folder and nothing below has changed since."""
    try:
        with np.load(kept) as content:
            if content["format"][0] != FORMAT or content["root"].tobytes() != os.fsencode(root):
                return None
            folders, ends = content["folders"].tobytes(), content["folder_ends"].tolist()
            places = [os.fsdecode(folders[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
            with ThreadPoolExecutor(THREADS) as pool:
                now = list(pool.map(lambda place: os.stat(os.path.join(root, place)).st_mtime_ns, places))
            if now != content["changed"].tolist():
                return None
            classes = tuple(os.fsdecode(c) for c in content["classes"].tobytes().split(b"\0"))
            return Index(root, classes, **{name: content[name] for name in ("labels", "names", "ends")})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


# --- which folders ----------------------------------------------------------------------------------------------------


def split_folders(path: str, val: str | None) -> tuple[str, str]:
    """The training and validation folders below `path`: train/, and `val` or val/ or test/."""
    train = os.path.join(path, "train")
    if not os.path.isdir(path):
        raise UserError(f"data folder {path} does not exist; expected {path}/train/CLASS/image.jpg")
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
