"""How the ranks come to their images: listed or opened by rank 0, copied by one rank per node, held in memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dist_lars import comm as ranks
from dist_lars import data
from dist_lars.comm import Comm
from dist_lars.config import Config, data_path
from dist_lars.data import stage
from dist_lars.data.index import index_of
from dist_lars.errors import AgreedError
from dist_lars.resources import free_memory


def open_sets(config: Config, comm: Comm, cores: int = 1) -> data.Sets:
    """The run's images. Rank 0 alone touches the folder; the others get its index and read images, nothing else."""
    d, given = config.data, data_path(config)
    if d.kind == "synthetic":
        return data.synthetic_sets(
            train=d.train_images, val=d.val_images, classes=d.classes, image_size=d.image_size, seed=config.seed
        )
    path = str(_digits(comm, d.image_size) if d.kind == "digits" else given)
    indexes = share_indexes(comm, lambda: _listed(path, d.val, d.hold_out))
    if place := stage_place(config):
        indexes = [_staged(comm, index, place) for index in indexes]
    held = None
    if d.cache != "none":
        room = 0.5 * free_memory() / comm.local_size
        held = ranks.patiently(comm, True, lambda: data.hold(indexes[0], d.cache, cores, room), "data.cache")
    return data.folder_sets(
        *indexes,
        seed=config.seed,
        image_size=d.image_size,
        resize=d.resize,
        min_scale=d.min_scale,
        flip=d.flip,
        augment=d.augment,
        held=held,
        skip=d.on_error == "skip",
        max_skipped=d.max_skipped,
        remember=_remembers(d.cache_val, len(indexes[1]), d.image_size, comm),
    )


def stage_place(config: Config) -> str | None:
    """Where each node copies packed shards to; None where it is not asked for, or images do not come from a folder."""
    return config.data.stage if config.data.kind == "folder" else None


def _listed(path: str, val: str | None, share: float) -> tuple[data.Index, data.Index]:
    """The images to train and to validate on."""
    train, validation = data.list_folders(path, val, data.cache_dir())
    return data.hold_out(train, share) if share else (train, validation)


def open_val(path: str, comm: Comm) -> data.Index:
    """The images to evaluate: val/ or test/ below `path`, or `path` itself, on every rank."""
    return share_indexes(comm, lambda: [data.open_index(data.val_folder(path), data.cache_dir())])[0]


def share_indexes(comm: Comm, listed: Callable[[], list[data.Index] | tuple[data.Index, ...]]) -> list[data.Index]:
    """What rank 0 lists, on all ranks, in memory that a rank's workers share."""
    found = ranks.patiently(comm, comm.rank == 0, listed, "data index")
    if comm.size == 1:
        return [index.shared() for index in found or []]
    headers = [(i.header(), {k: (a.shape, a.dtype.str) for k, a in i.arrays().items()}) for i in found or []]
    indexes = list(found or [])
    for n, (header, shapes) in enumerate(comm.broadcast(headers, "data index header")):
        if comm.rank != 0:
            indexes.append(index_of(header, {k: np.empty(shape, dtype) for k, (shape, dtype) in shapes.items()}))
        indexes[n] = indexes[n].shared()
        arrays = {f"data index {n} {k}": torch.from_numpy(a) for k, a in indexes[n].arrays().items() if a.size}
        comm.broadcast_(arrays)
    return indexes


def _staged(comm: Comm, index: data.Index, place: str) -> data.Index:
    """The same index, read from the copy on this node."""
    if not index.shards:
        raise AgreedError(
            f"data.stage copies packed shards, and {index.root} is an image folder: python -m dist_lars.pack makes them"
        )
    name = ranks.on_first_rank(comm, lambda: stage.stage_name(index.root), "stage name")
    target = ranks.patiently(comm, True, lambda: str(Path(stage.expand(place)) / name), "stage folder")
    ranks.patiently(comm, comm.local_rank == 0, lambda: stage.stage(index.root, str(target)), "stage")
    return replace(index, root=str(target)).shared()


def leave(config: Config, comm: Comm, sets: data.Sets) -> None:
    """Remove the copies of the shards where that was asked for; by one rank per node, when all have finished."""
    if not stage_place(config) or config.data.stage_keep:
        return
    comm.barrier()
    for images in (sets.train, sets.val):
        if comm.local_rank == 0 and Path(images.index.root).name.startswith("dist_lars-"):  # type: ignore[union-attr]
            stage.unstage(images.index.root)  # type: ignore[union-attr]


def _remembers(wanted: bool | None, images: int, size: int, comm: Comm) -> bool:
    """Whether a rank keeps its share of the validation images: as told, else if a quarter of the memory is enough."""
    if wanted is not None:
        return wanted
    return images / comm.size * comm.local_size * size * size * 3 < 0.25 * free_memory()


def _digits(comm: Comm, size: int) -> str:
    def make() -> str:
        return data.digits_folder(data.cache_dir(), size)

    ranks.patiently(comm, comm.local_rank == 0, make, "digits")  # once per host: caches need not be shared
    return make()


def advice(config: Config, sets: data.Sets, workers: int) -> str:
    """What helps this run when it waits for data."""
    packed = bool(getattr(getattr(sets.train, "index", None), "shards", ()))
    cached = config.data.cache == "decoded" or config.data.kind == "synthetic"
    return stage.advice(workers, packed, config.data.stage is not None, cached)


def images_of(config: Config, sets: data.Sets) -> str:
    """What `evaluate --data.path` takes to see the validation images of this run again."""
    if config.data.kind == "digits":
        return str(Path(sets.val.index.root).parent)  # type: ignore[union-attr]
    return config.data.val or data_path(config) or "DIR"


def check_skipped(found: list[dict[str, str]], limit: int) -> dict[str, str]:
    """All files that the ranks found to be no images; refused above the limit of the job."""
    together = {name: why for own in found for name, why in own.items()}
    if len(together) > limit:
        raise AgreedError(
            f"{len(together)} files could not be read as images, and --data.max_skipped {limit} allows no more; the "
            f"last: {list(together.items())[-1]}"
        )
    return together
