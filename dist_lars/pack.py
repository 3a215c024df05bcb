"""`python -m dist_lars.pack SRC DST`: an image folder as tar shards, which parallel file systems like better.

SRC has train/CLASS/image.jpg and val/ or test/, or CLASS/image.jpg itself. DST is then what --data.path takes, with the
same images in the same order; the webdataset library reads its shard-*.tar too. Run it again after an interruption.
`python -m dist_lars.pack DST --verify` compares every shard with its SHA-256.
"""

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_lars.cli import command_parser, fail, normalise, typed
from dist_lars.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Parse, then pack or verify."""
    parser = command_parser("python -m dist_lars.pack", __doc__ or "")
    parser.add_argument("src", type=str, help="the image folder (with --verify: the packed folder)")
    parser.add_argument("dst", type=str, nargs="?", help="where the shards go")
    parser.add_argument("--size", type=str, default="256", help="shorter side of larger images; none keeps all bytes")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of images that are made smaller")
    parser.add_argument("--shard_mb", type=float, default=512.0, help="size of a shard, at most, in MB")
    parser.add_argument("--workers", type=int | None, default=None, help="processes (default: one per core)")
    parser.add_argument("--verify", action="store_true", help="compare every shard with its checksum")
    try:
        given = typed(parser, normalise(sys.argv[1:] if argv is None else argv, parser))
        act(given)
    except UserError as e:
        fail(e)


def act(given: dict[str, Any]) -> None:
    """Do what the options say, for every split of the source."""
    if given["verify"]:
        for folder in packed_folders(given["src"]):
            verify(folder)
        return
    if not given["dst"]:
        raise UserError("where should the shards go? python -m dist_lars.pack SRC DST")
    size = size_of(given["size"])
    if not 1 <= given["quality"] <= 100:
        raise UserError(f"--quality is {given['quality']}, but JPEG knows 1 to 100")
    if given["workers"] is not None and given["workers"] < 1:
        raise UserError(f"--workers is {given['workers']}, but at least one process must do the work")
    if not given["shard_mb"] > 0:
        raise UserError(f"--shard_mb is {given['shard_mb']}, but it must be above 0")
    from dist_lars.data.packing import Options
    from dist_lars.resources import cores

    options = Options(size, given["quality"], given["shard_mb"])
    for split, source in splits(given["src"]).items():
        pack_split(source, str(Path(given["dst"]) / split), split, options, given["workers"] or cores())


def size_of(text: str) -> int | None:
    """The value of --size."""
    if text == "none":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--size is {text!r}, but it must be a number of pixels, or none to keep every file's bytes")
    return int(text)


def splits(src: str) -> dict[str, str]:
    """{folder below DST: folder of classes}."""
    root = Path(src)
    if not (root / "train").is_dir():
        return {"": src}
    val = [str(root / name) for name in ("val", "test") if (root / name).is_dir()]
    return {"train": str(root / "train")} | ({"val": val[0]} if val else {})


def pack_split(source: str, folder: str, split: str, options: Any, workers: int) -> None:
    """Pack one folder of classes, and say what came of it."""
    from dist_lars import data
    from dist_lars.data.packing import pack
    from dist_lars.data.shards import is_packed

    if is_packed(source):
        raise UserError(f"{source} holds packed shards already: pack from the image folder")
    index = data.index_folder(source, data.cache_dir())
    began, label = time.monotonic(), split or Path(source).absolute().name
    with tqdm(total=len(index), unit=" images", desc=f"packing {label}") as bar:
        meta = pack(index, folder, options, workers, bar.update)
    print(describe(label, folder, meta, time.monotonic() - began), flush=True)


def describe(label: str, folder: str, meta: dict[str, Any], seconds: float) -> str:
    """The summary that ends a packing."""
    size, listed, skipped = sum(s["bytes"] for s in meta["shards"]), meta["plan"]["listed"], meta["skipped"]
    lines = [
        f"{label}: {meta['images']:,} of {listed:,} images in {len(meta['shards'])} shards, {size / 1e9:.2f} GB "
        f"({size / meta['images'] / 1e3:.0f} KB per image), {seconds:.0f} s: {folder}"
    ]
    if skipped:
        lines.append(f"  skipped {len(skipped)} (all in {Path(folder) / 'shards.json'}):")
        lines += [f"    {s['file']}: {s['why']}" for s in skipped[:20]]
    return "\n".join(lines)


def packed_folders(path: str) -> list[str]:
    """The packed folders at and directly below `path`."""
    from dist_lars.data.shards import is_packed

    found = [p for p in (path, *(str(Path(path) / name) for name in ("train", "val"))) if is_packed(p)]
    if not found:
        raise UserError(f"{path} holds no packed shards")
    return found


def verify(folder: str) -> None:
    """Read every shard once; raises `UserError` for the first that differs from its checksum."""
    from dist_lars.data.shards import check_sizes, digest_of_file, read_meta

    meta = read_meta(folder)
    check_sizes(folder, meta)
    for shard in tqdm(meta["shards"], unit=" shards", desc=f"verifying {folder}"):
        path = Path(folder) / shard["name"]
        if digest_of_file(path) != shard["sha256"]:
            raise UserError(f"shard {path} is not what was packed (its SHA-256 differs): copy or pack it again")
    print(f"{folder}: {meta['images']:,} images in {len(meta['shards'])} shards, all as they were packed")


if __name__ == "__main__":
    main()
