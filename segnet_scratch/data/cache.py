"""Decoded samples kept for the next epoch, in memory or on disk: what a training run's setting `cache` means.

Decoding a JPEG and a PNG takes some milliseconds a sample and gives the same pixels every epoch. Both caches hold
uint8 and return exactly what VOCDataset does, as arrays that cannot be written to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from segnet_scratch.data.disk_cache import DiskCachedDataset
from segnet_scratch.data.memory_cache import MemoryCachedDataset
from segnet_scratch.data.voc import VOCDataset

CacheMode = Literal["none", "memory", "disk"]


def open_dataset(
    path: str | Path,
    split: str,
    cache: CacheMode = "none",
    longest: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VOCDataset:
    """The split of a data set, read through the cache that is asked for.

    longest: pixels that the longer side of a cached sample has at most (see `shrunk`); no bound unless given, and none
    without a cache. progress is told of the samples decoded and their number while a cache on disk is made. Raises
    DataError as VOCDataset does; with "disk" also, at once, for any sample that cannot be read, and for want of room.
    """
    if cache == "memory":
        return MemoryCachedDataset(path, split, longest=longest)
    if cache == "disk":
        return DiskCachedDataset(path, split, longest=longest, progress=progress)
    return VOCDataset(path, split)
