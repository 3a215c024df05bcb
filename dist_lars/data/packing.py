"""Image folder -> packed shards: by many processes, shard by shard, so that a killed packing goes on where it stood.

The shards of one source and one set of options are the same bytes however often the packing was interrupted and
however many processes made them.
"""

import collections
import concurrent.futures
import hashlib
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_lars.checkpoint import write_aside
from dist_lars.data.decode import BadImage, decode, resize
from dist_lars.data.index import Index, packed_names
from dist_lars.data.order import permutation
from dist_lars.data.process import settle
from dist_lars.data.shards import FORMAT, INDEX, META, WORK, Entry, ShardWriter, extension_of, read_meta, room_of
from dist_lars.data.transforms import shorter_side
from dist_lars.errors import UserError
from dist_lars.locks import lock

CHUNK = 8  # images per task: a task's way to a process and back costs as much as half an image


@dataclass(frozen=True)
class Options:
    """How images are packed."""

    size: int | None  # pixels of the shorter side of larger images; None keeps every file's bytes
    quality: int  # of JPEG, where an image is made smaller
    shard_mb: float  # MB (10^6 bytes) that a shard may have


def shrink(data: bytes, size: int | None, quality: int) -> bytes:
    """The image's bytes as they are packed; raises `BadImage` for those that do not decode to the end.

    An image that is small enough keeps its bytes, whatever their format. A larger one is made smaller by the filter
    that validation uses, and loses EXIF, profiles and alpha.
    """
    pixels = decode(data)
    height, width = pixels.shape[:2]
    if size is None or min(width, height) <= size:
        return data
    smaller = io.BytesIO()
    pixels = resize(pixels, *shorter_side(width, height, size))
    # Optimised Huffman tables: 3 % fewer bytes, 2 % faster to decode.
    Image.fromarray(pixels).save(smaller, "JPEG", quality=quality, optimize=True)
    return smaller.getvalue()


def pack(index: Index, folder: str, options: Options, workers: int, progress: Callable[[int], Any]) -> dict[str, Any]:
    """Pack the images of `index` into `folder`; what shards.json says of it. `progress` is told of images done.

    Goes on with an unfinished packing of the same images and options; refuses a folder with anything else.
    """
    target = Path(folder)
    plan = {"format": FORMAT, "options": asdict(options), "listed": len(index), "digest": digest_of(index)}
    if (target / META).exists():
        _same(read_meta(folder)["plan"], plan, folder)
        progress(len(index))
        return read_meta(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / WORK).is_dir():
        raise UserError(f"{folder} is not empty, and nothing was packed there before: choose another folder")
    (target / WORK).mkdir(parents=True, exist_ok=True)
    try:
        held = lock(target / WORK / "lock")
    except BlockingIOError as e:
        raise UserError(f"another process is packing into {folder}: wait for it, or end it") from e
    with held:
        begun = target / WORK / "plan.json"
        if begun.exists():
            _same(json.loads(begun.read_text(encoding="utf-8")), plan, folder)
        write_aside(begun, json.dumps(plan).encode())
        parts = _finished_parts(target)
        progress(parts[-1]["position"] if parts else 0)
        parts += _write_shards(index, target, options, workers, parts, progress)
        meta = _finish(index, target, parts, plan)
    for file in (target / WORK).iterdir():
        file.unlink()
    (target / WORK).rmdir()
    return meta


def digest_of(index: Index) -> str:
    """A digest of which images are listed and how they are called."""
    digest = hashlib.sha256("\0".join(index.classes).encode("utf-8", "surrogateescape"))
    for array in (index.labels, index.names, index.ends):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _same(old: dict[str, Any], new: dict[str, Any], folder: str) -> None:
    if old == new:
        return
    words = [f"{k} {v}, now {new['options'].get(k)}" for k, v in old["options"].items() if v != new["options"].get(k)]
    if old["listed"] != new["listed"]:
        words.append(f"{old['listed']:,} images listed, now {new['listed']:,}")
    raise UserError(
        f"{folder} holds another packing ({'; '.join(words) or 'of other images'}): choose another folder, or remove it"
    )


# --- shards, one after the other ------------------------------------------------------------------------------------


def _write_shards(
    index: Index, target: Path, options: Options, workers: int, parts: list[dict[str, Any]], progress: Callable
) -> list[dict[str, Any]]:
    """Write what is left, images in the fixed random order of packing; one dict per new shard."""
    order = permutation(len(index), 0, 0)
    position = parts[-1]["position"] if parts else 0
    written: list[dict[str, Any]] = []
    shard = _Shard(target, len(parts))
    for number, data in _shrunk(index, order[position:], options, workers):
        if isinstance(data, str):
            shard.skipped.append((number, data))
        else:
            if shard.writer.numbers and shard.writer.position + room_of(len(data)) > options.shard_mb * 1e6:
                written.append(shard.close(position))
                shard = _Shard(target, shard.k + 1)
            shard.writer.add(Entry(number, int(index.labels[number]), data, extension_of(data)))
        position += 1
        progress(1)
    if shard.writer.numbers or shard.skipped:
        written.append(shard.close(position))
    else:
        shard.discard()
    return written


class _Shard:
    """A shard that is being written, aside; `close` gives it its name and notes what it holds."""

    def __init__(self, target: Path, k: int) -> None:
        self.target, self.k, self.name = target, k, f"shard-{k:06d}.tar"
        self.aside = target / WORK / self.name
        self.writer = ShardWriter(self.aside.open("wb"))
        self.skipped: list[tuple[int, str]] = []

    def close(self, position: int) -> dict[str, Any]:
        """`position`: how many images of the order are done with."""
        w = self.writer
        w.close()
        w.file.close()
        part = {
            "name": self.name, "position": position, "bytes": w.position, "sha256": w.digest.hexdigest(),
            "numbers": w.numbers, "places": w.places, "skipped": self.skipped,
        }  # fmt: skip
        self.aside.replace(self.target / self.name)
        write_aside(self.target / WORK / f"{self.name}.json", json.dumps(part).encode())
        return part

    def discard(self) -> None:
        self.writer.file.close()
        self.aside.unlink()


def _finished_parts(target: Path) -> list[dict[str, Any]]:
    """The shards that were written whole, in order."""
    parts: list[dict[str, Any]] = []
    while (note := target / WORK / f"shard-{len(parts):06d}.tar.json").exists():
        part = json.loads(note.read_text(encoding="utf-8"))
        shard = target / part["name"]
        if not shard.exists() or shard.stat().st_size != part["bytes"]:
            break
        parts.append(part)
    return parts


def _finish(index: Index, target: Path, parts: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """Write index.npz, then shards.json, whose presence says that all is there."""
    places = np.full((len(index), 3), -1, np.int64)
    for k, part in enumerate(parts):
        if part["numbers"]:
            places[part["numbers"], 0] = k
            places[part["numbers"], 1:] = part["places"]
    kept = np.flatnonzero(places[:, 0] >= 0)
    skipped = sorted((number, why) for part in parts for number, why in part["skipped"])
    if len(kept) + len(skipped) != len(index):
        raise AssertionError(f"{len(kept)} packed and {len(skipped)} skipped are not the {len(index)} listed")
    if not len(kept):
        raise UserError(f"none of the {len(index):,} files is an image; the first: {index.path(0)}: {skipped[0][1]}")
    ends = index.ends.tolist()
    names, name_ends = packed_names([index.names[ends[i - 1] if i else 0 : ends[i]].tobytes() for i in kept.tolist()])
    content = io.BytesIO()
    np.savez(content, labels=index.labels[kept], names=names, ends=name_ends, places=places[kept])
    write_aside(target / INDEX, content.getvalue())
    shards = [{k: part[k] for k in ("name", "bytes", "sha256")} | {"images": len(part["numbers"])} for part in parts]
    meta = {
        "format": FORMAT, "images": len(kept), "classes": list(index.classes), "shards": shards, "plan": plan,
        "skipped": [{"file": index.name(number), "why": why} for number, why in skipped],
    }  # fmt: skip
    write_aside(target / META, json.dumps(meta, indent=1).encode())
    return meta


# --- processes ------------------------------------------------------------------------------------------------------


def _shrunk(index: Index, order: np.ndarray, options: Options, workers: int) -> Iterator[tuple[int, bytes | str]]:
    """(number, bytes or why not) of every image, in order, a bounded number ahead."""
    chunks = [order[i : i + CHUNK].tolist() for i in range(0, len(order), CHUNK)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_lars.data.packing", "dist_lars.cli"])
    with ProcessPoolExecutor(workers, context, _begin_worker, (index.shared(), options)) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_shrink_chunk, chunk))
                if len(waiting) >= 8 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as e:
            raise UserError(
                "a packing process was killed, as a rule for lack of memory: run the same command again (finished "
                f"shards are kept), with fewer --workers than {workers}"
            ) from e
        finally:
            for future in waiting:
                future.cancel()


_job: tuple[Index, Options]


def _begin_worker(index: Index, options: Options) -> None:
    global _job
    _job = (index, options)
    settle()


def _shrink_chunk(numbers: list[int]) -> list[tuple[int, bytes | str]]:
    return [(number, _shrink_one(number)) for number in numbers]


def _shrink_one(number: int) -> bytes | str:
    index, options = _job
    try:
        return shrink(index.read(number), options.size, options.quality)
    except BadImage as e:
        return e.why
