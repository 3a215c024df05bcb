"""Images: where they lie, in which order they are seen, how they are augmented and batched."""

from dist_lars.data.cache import Held, Remembered, hold
from dist_lars.data.folder import index_folder, val_folder
from dist_lars.data.index import Index
from dist_lars.data.loader import Batches, TrainOrder, ValOrder, batches
from dist_lars.data.order import permutation, shard_indices, validation_range
from dist_lars.data.sets import Sets, folder_sets, hold_out, list_folders, open_index, synthetic_sets, val_images
from dist_lars.data.synthetic import cache_dir, digits_folder

__all__ = [
    "Batches",
    "Held",
    "Index",
    "Remembered",
    "Sets",
    "TrainOrder",
    "ValOrder",
    "batches",
    "cache_dir",
    "digits_folder",
    "folder_sets",
    "hold",
    "hold_out",
    "index_folder",
    "list_folders",
    "open_index",
    "permutation",
    "shard_indices",
    "synthetic_sets",
    "val_folder",
    "val_images",
    "validation_range",
]
