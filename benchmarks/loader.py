"""`python -m benchmarks.loader`: images/s per core, what data costs a training, and the start on a million files.

Needs the JPEG files of $DIST_LARS_SAMPLES/imagenet_sample.tar (flat, named nWNID_name.JPEG); webdataset and
nvidia-dali-cuda130 are compared where they are installed. Three records:

loader        images/s of the full training transform on one core, pipelines in turn (see benchmarks/loader_feeds.py)
loader_train  ResNet-18 at 224 px on 2 ranks, blocks of steps in turn from random images, shards and JPEG files
loader_index  seconds and memory until 8 ranks know 1,281,167 images: ours listed, ours from the kept list, torchvision
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import record, show
from benchmarks.loader_feeds import BATCH, FEEDS, TIMED
from benchmarks.trainer import launch

IMAGES, CLASSES = 1_281_167, 1000
TARGETS = {"ours, folder": 1.6, "ours, shards of 256 px": 4.5}
SETTLE = 1.5  # seconds after a turn: its worker still makes batches ahead, on the core of the next
NEEDS = {"webdataset": "webdataset", "DALI": "nvidia.dali"}


def main() -> None:
    """Run the parts and write their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=os.environ.get("DIST_LARS_SAMPLES"))
    parser.add_argument("--rounds", type=int, default=7, help="of every comparison")
    parser.add_argument(
        "--core", type=int, default=max(os.sched_getaffinity(0)), help="that the pipelines are pinned to"
    )
    parser.add_argument("--ranks", type=int, default=8, help="that list the folder")
    parser.add_argument("--only", choices=["feeds", "train", "index"], action="append", help="parts to run (all)")
    args = parser.parse_args()
    parts = args.only or ["feeds", "train", "index"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.samples and {"feeds", "train"} & set(parts):
            images, packed = prepare(Path(args.samples), folder)
            if "feeds" in parts:
                compare_feeds(images, packed, args.rounds, args.core)
            if "train" in parts:
                compare_training(images, packed, args.rounds, folder)
        if "index" in parts:
            compare_index(folder, args.ranks)


def prepare(samples: Path, folder: Path) -> tuple[Path, Path]:
    """(image folder, its shards of 256 px); IMAGES-256 holds the shards' images as files, for the peers."""
    flat, images, packed = folder / "flat", folder / "images", folder / "packed"
    with tarfile.open(samples / "imagenet_sample.tar") as archive:
        archive.extractall(flat, filter="data")
    for i, file in enumerate(sorted(flat.rglob("*.JPEG"))):
        for split in ("train", "val"):
            target = images / split / f"class{i % 20:02d}"
            target.mkdir(parents=True, exist_ok=True)
            (target / file.name).hardlink_to(file)
    words = [sys.executable, "-m", "dist_lars.pack", str(images), str(packed), "--size", "256", "--shard_mb", "3"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "DIST_LARS_CACHE": str(folder / "cache")}
    subprocess.run(words, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    from dist_lars.data import open_index

    index = open_index(str(packed / "train"))
    for i in range(len(index)):
        target = Path(f"{images}-256") / "train" / index.name(i)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(index.read(i))
    return images, packed


# --- one core -------------------------------------------------------------------------------------------------------


def compare_feeds(images: Path, packed: Path, rounds: int, core: int) -> None:
    """Every pipeline in a process of its own, asked in turn."""
    names = [n for n in FEEDS if all(installed(m) for word, m in NEEDS.items() if n.startswith(word))]
    for name in FEEDS.keys() - set(names):
        print(f"not compared, for it is not installed: {name}")
    processes = {name: start_feed(name, images, packed, core) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for turn in range(rounds + 1):
            for name, process in processes.items():
                value = ask(name, process)
                if turn:  # the first starts workers
                    seconds[name].append(value)
                time.sleep(SETTLE)
    finally:
        for process in processes.values():
            process.kill()
    base, rows = seconds["torchvision, folder"], []
    for name, values in seconds.items():
        speed = record.summary([BATCH * TIMED / v for v in values])
        ratio = record.ratio(base, values)
        row = {"pipeline": name, "images/s per core": speed["median"], "p10": speed["p10"], "p90": speed["p90"]}
        row |= {"times torchvision, folder": ratio["median"], "low": ratio["low"], "high": ratio["high"]}
        rows.append(row | ({"wanted": TARGETS[name]} if name in TARGETS else {}))
    print(show.markdown(rows))
    versions = {m: record.metadata.version(m) for m in ("simplejpeg", "webdataset", "nvidia-dali-cuda130") if known(m)}
    print(record.write("loader", rows, seconds, batch=BATCH, images_per_time=BATCH * TIMED, peers=versions))


def installed(module: str) -> bool:
    """Whether it can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def known(package: str) -> bool:
    """Whether its version is known."""
    try:
        return bool(record.metadata.version(package))
    except record.metadata.PackageNotFoundError:
        return False


def start_feed(name: str, images: Path, packed: Path, core: int) -> subprocess.Popen:
    """The pipeline's process."""
    root = str(Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.loader_feeds", name, str(images), str(packed), str(core)]
    return subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=images)


def ask(name: str, process: subprocess.Popen) -> float:
    """Seconds of one turn."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("SECONDS"):
            return float(line.split()[1])
    raise SystemExit(f"{name} ended with {process.wait()}")


# --- training -------------------------------------------------------------------------------------------------------


def compare_training(images: Path, packed: Path, rounds: int, folder: Path) -> None:
    """ResNet-18 on 2 ranks, from every source in turn."""
    words = [sys.executable, "-m", "benchmarks.loader_train", str(images), str(packed), str(rounds)]
    found = result(launch(2, words, folder))
    base, rows = found["speeds"]["synthetic"], []
    for name, speeds in found["speeds"].items():
        ratio = record.ratio(speeds, base)
        row = {"images from": name, "images/s": record.summary(speeds)["median"], "share of synthetic": ratio["median"]}
        rows.append(row | {"low": ratio["low"], "high": ratio["high"]} | ({"wanted": 0.97} if "shards" in name else {}))
    print(show.markdown(rows))
    extra = {"ranks": 2, "model": "resnet18", "unit": "images/s of all ranks, not seconds"}
    print(record.write("loader_train", rows, found["speeds"], workers=found["workers"], **extra))


def result(output: str) -> dict[str, Any]:
    """What rank 0 printed."""
    line = next(line for line in output.splitlines() if "RESULT" in line)
    return json.loads(line.split("RESULT", 1)[1])


# --- the start ------------------------------------------------------------------------------------------------------


def compare_index(folder: Path, ranks: int) -> None:
    """1,281,167 empty files in 1,000 folders, known by every rank of one host."""
    tree = folder / "million"
    make_tree(tree)
    time.sleep(2.1)  # a folder changed just now is not kept
    rows = []
    for name, what, cache in (
        ("ours, listed", "ours", str(folder / "kept")),
        ("ours, list kept", "ours", str(folder / "kept")),
        ("torchvision ImageFolder", "torchvision", ""),
    ):
        words = [sys.executable, "-m", "benchmarks.loader_index", what, str(tree), cache]
        found = result(launch(ranks, words, folder))
        assert found["images"] == IMAGES
        rows.append({
            "index": name, "ranks": ranks, "seconds": found["seconds"], "MB per rank": found["mb"],
            "MB sent to each worker": found["worker_mb"],
        })  # fmt: skip
    print(show.markdown(rows))
    raw = {row["index"]: [row["seconds"]] for row in rows}
    print(record.write("loader_index", rows, raw, images=IMAGES, note="one host, warm file cache"))
    shutil.rmtree(tree, ignore_errors=True)


def make_tree(tree: Path) -> None:
    """ImageNet's names and class sizes, without content."""

    def one(label: int) -> None:
        name = f"n{10_000_000 + 7919 * label % 9_000_000:08d}"
        place = tree / name
        place.mkdir(parents=True)
        handle = os.open(place, os.O_RDONLY)
        for i in range(IMAGES * label // CLASSES, IMAGES * (label + 1) // CLASSES):
            os.close(os.open(f"{name}_{i}.JPEG", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
        os.close(handle)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(CLASSES)))


if __name__ == "__main__":
    main()
