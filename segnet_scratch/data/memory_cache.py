"""A data set that keeps in memory what it has decoded."""

import threading
from pathlib import Path

import numpy as np

from segnet_scratch.data.transforms import resize_image, resize_mask
from segnet_scratch.data.voc import VOCDataset

MEMORY_LIMIT = 4 << 30
"""Bytes that a cache takes at most, unless told otherwise: some 5,000 samples of VOC's size."""

Sample = tuple[np.ndarray, np.ndarray, str]
"""Image uint8 (H, W, 3), mask uint8 (H, W), id."""


class MemoryCachedDataset(VOCDataset):
    """Keeps what was decoded, up to `limit` bytes; what comes after that is decoded every time.

    Nothing is ever dropped for something newer: an epoch takes every sample once, in a new order, so which samples
    are kept makes no difference, and exchanging them would only cost.
    """

    def __init__(self, path: str | Path, split: str, limit: int = MEMORY_LIMIT, longest: int | None = None) -> None:
        super().__init__(path, split)
        self.held = 0  # bytes
        self._limit = limit
        self._longest = longest
        self._kept: dict[int, Sample] = {}
        self._lock = threading.Lock()

    def sample(self, index: int) -> Sample:
        """As VOCDataset, from memory where it is there; the arrays cannot be written to."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        sample = image, mask, _ = shrunk(super().sample(index), self._longest)
        for array in (image, mask):
            array.flags.writeable = False
        with self._lock:
            size = image.nbytes + mask.nbytes
            if index not in self._kept and self.held + size <= self._limit:
                self._kept[index] = sample
                self.held += size
        return sample


def shrunk(sample: Sample, longest: int | None) -> Sample:
    """A sample with its longer side at most `longest` pixels; as it is where it is no longer, or with None.

    Resized as the transforms do it, bilinear with antialias for images and nearest for masks. Training then resizes a
    second time, so its pixels differ slightly from those of the full picture; no resolution is lost as long as
    `longest` is at least the larger side of the training size times the largest scale. Not for scoring: there the
    mask's own size counts.
    """
    image, mask, name = sample
    if longest is None or max(mask.shape) <= longest:
        return sample
    height, width = (max(1, round(side * longest / max(mask.shape))) for side in mask.shape)
    return resize_image(image, (height, width)), resize_mask(mask, (height, width)), name
