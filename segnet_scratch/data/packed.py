"""Decoded samples of any size packed for the device, which makes the batch of them (ops/resampling/augment.py).

What `TrainTransform` does on the CPU, with the same random numbers. Images differ by Pillow's rounding to bytes, labels
where a position falls exactly between two pixels: Pillow adds up rounded steps and may take the one before.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.data.transforms import IMAGENET_MEAN, IMAGENET_STD, View, check_pair
from segnet_scratch.errors import DataError, ShapeError
from segnet_scratch.ops.resampling.augment import AugmentForward
from segnet_scratch.runtime.devices import Array, Device


class Packed(NamedTuple):
    """The inputs of AugmentForward for one batch."""

    images: np.ndarray
    masks: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    views: np.ndarray
    tones: np.ndarray
    channels: np.ndarray


def pack(
    samples: Sequence[tuple[np.ndarray, np.ndarray]], views: Sequence[View], dtype: DTypeLike = np.float32
) -> Packed:
    """A batch of (image uint8 (H, W, 3), mask uint8 (H, W)) with the view of each.

    ShapeError, DTypeError for pairs that are none, DataError where a view cannot be carried out.
    """
    if not samples or len(samples) != len(views):
        raise ShapeError(f"pack: {len(samples)} samples and {len(views)} views; expected as many, and one at least")
    for (image, mask), view in zip(samples, views, strict=True):
        check_pair(image, mask)
        if min(view.scaled) < 1 or max(*view.scaled, abs(view.top), abs(view.left)) >= 2**30:
            raise DataError(f"pack: {view}: expected a scaled size of at least 1x1, and places below 2^30")
    pixels = [mask.size for _, mask in samples]
    return Packed(
        np.concatenate([image.reshape(-1, 3) for image, _ in samples]),
        np.concatenate([mask.reshape(-1) for _, mask in samples]),
        np.cumsum([0, *pixels[:-1]], dtype=np.int64),
        np.array([mask.shape for _, mask in samples], np.int32),
        np.array([(*v.scaled, v.top, v.left, v.flip) for v in views], np.int32),
        np.array([(v.contrast, v.brightness) for v in views], dtype),
        np.array([IMAGENET_MEAN, IMAGENET_STD], dtype),
    )


def augment(device: Device, arrays: Sequence[Array], size: tuple[int, int]) -> tuple[Array, Array]:
    """Images (n, *size, 3), normalised, and labels uint8 (n, *size), from the arrays of a Packed on the device."""
    inputs = Packed(*arrays)
    op = AugmentForward.plan(len(inputs.starts), len(inputs.masks), size, inputs.tones.dtype)
    out = op(device, **inputs._asdict())
    return out.y, out.labels
