"""One pipeline of `benchmarks.loader` in a process of its own, pinned to one core: asked on stdin, it feeds once.

Every pipeline makes batches of 64 of the full training transform at 224 px: random resized crop, mirror. torchvision,
webdataset and DALI give normalised float32 on the host, as their users have it; ours gives uint8, which the device
normalises in one pass; `ours, normalised` adds that pass on the host's core, for the same product.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH, WARM, TIMED, SIZE = 64, 6, 8, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def usual_transform() -> Any:
    """torchvision's training transform, as in its ImageNet examples."""
    from torchvision import transforms as t

    return t.Compose([t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(MEAN, STD)])


def torchvision(folder: str) -> Iterator[int]:
    """ImageFolder + the usual transforms + DataLoader with one worker."""
    import torch
    from torchvision.datasets import ImageFolder

    images = ImageFolder(f"{folder}/train", usual_transform())
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=1, drop_last=True, persistent_workers=True, worker_init_fn=one_thread
    )
    for _ in itertools.count():
        yield from (len(labels) for _, labels in loader)


def one_thread(_: int) -> None:
    """A worker does not compete with itself."""
    import torch

    torch.set_num_threads(1)


def ours(path: str, normalised: bool = False) -> Iterator[int]:
    """dist_lars.data with one worker."""
    from dist_lars import data
    from dist_lars.data.transforms import normalise

    indexes = [index.shared() for index in data.list_folders(path, None)]
    sets = data.folder_sets(*indexes, seed=0, image_size=SIZE, resize=256, min_scale=0.08, flip=True)
    order = data.TrainOrder(len(sets.train), 0, 0, 1, BATCH, BATCH, 0, 10**9)
    for pixels, labels in data.batches(sets.train, order, 1, pin=False):
        if normalised:
            normalise(pixels)
        yield len(labels)


def webdataset(folder: str) -> Iterator[int]:
    """The webdataset library on the shards, with its own Pillow decoding and the usual transforms, one worker."""
    import torch
    import webdataset as wds

    urls = sorted(str(p) for p in Path(folder, "train").glob("*.tar"))
    images = wds.WebDataset(urls, shardshuffle=False, resampled=True).shuffle(64).decode("pil")
    images = images.to_tuple("jpg;png", "cls").map_tuple(usual_transform(), int).batched(BATCH, partial=False)
    loader = torch.utils.data.DataLoader(images, batch_size=None, num_workers=1, worker_init_fn=one_thread)
    for _, labels in loader:
        yield len(labels)


def dali(folder: str, shards: bool = False) -> Iterator[int]:
    """NVIDIA DALI on the CPU with one thread and its region decoder."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        if shards:
            urls = sorted(str(p) for p in Path(folder, "train").glob("*.tar"))
            data, labels = fn.readers.webdataset(
                paths=urls, ext=["jpg", "cls"], random_shuffle=True, missing_component_behavior="skip"
            )
        else:
            data, labels = fn.readers.file(file_root=f"{folder}/train", random_shuffle=True)
        images = fn.decoders.image_random_crop(data, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0])
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), dtype=types.FLOAT,
            mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
        )  # fmt: skip
        return images, labels

    made = pipeline()
    made.build()
    while True:
        images, _ = made.run()
        yield len(images)


FEEDS: dict[str, Callable[[str, str], Iterator[int]]] = {
    "torchvision, folder": lambda folder, packed: torchvision(folder),
    "torchvision, folder of 256 px": lambda folder, packed: torchvision(f"{folder}-256"),
    "ours, folder": lambda folder, packed: ours(folder),
    "ours, shards of 256 px": lambda folder, packed: ours(packed),
    "ours, folder, normalised": lambda folder, packed: ours(folder, True),
    "ours, shards of 256 px, normalised": lambda folder, packed: ours(packed, True),
    "webdataset, shards of 256 px": lambda folder, packed: webdataset(packed),
    "DALI on the CPU, folder": lambda folder, packed: dali(folder),
    "DALI on the CPU, shards of 256 px": lambda folder, packed: dali(packed, True),
}


def main() -> None:
    """FEED FOLDER PACKED CORE: for every line on stdin, print the seconds of TIMED batches."""
    name, folder, packed, core = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    import torch

    torch.set_num_threads(1)
    stream = FEEDS[name](folder, packed)
    for _ in sys.stdin:
        for _ in range(WARM):  # what was made while others had their turn
            next(stream)
        began = time.perf_counter()
        images = sum(next(stream) for _ in range(TIMED))
        print("SECONDS", time.perf_counter() - began, images, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
