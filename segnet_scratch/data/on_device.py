"""Training batches made on the device, from decoded pictures that lie there: the setting `cache = "device"`."""

from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.data.loader import Batch, Loader, sample_rng
from segnet_scratch.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ColourJitter, TrainTransform
from segnet_scratch.data.voc import VOCDataset
from segnet_scratch.errors import ConfigError, DataError
from segnet_scratch.ops.resampling.augment import AugmentForward
from segnet_scratch.runtime.devices import Device


class DeviceLoader(Loader):
    """A Loader whose batches are arrays of a device, cut out of the whole split there (ops/resampling/augment.py).

    Order and views are those of a Loader, whose `options` it takes; pixels differ by Pillow's rounding to bytes, labels
    where a position falls exactly between two pixels: Pillow adds up rounded steps and may take the one before. The
    split is decoded and uploaded once: 4 bytes per pixel. ConfigError for colour jitter, which the kernel does
    otherwise; DataError for a sample that cannot be read.
    """

    def __init__(
        self,
        dataset: VOCDataset,
        transform: TrainTransform,
        batch: int,
        device: Device,
        dtype: DTypeLike = np.float32,
        **options: Any,
    ) -> None:
        super().__init__(dataset, transform, batch, workers=0, **options)
        if transform.jitter != ColourJitter():
            raise ConfigError('cache = "device": expected no colour jitter, got some; set brightness, ... to 0.')
        self.views, self.device, self.dtype = transform, device, np.dtype(dtype)
        images, masks, self.names = zip(*(self.sample(index) for index in range(len(dataset))), strict=True)
        self.sizes = np.array([mask.shape for mask in masks], np.int32)
        self.starts = np.cumsum([0, *(mask.size for mask in masks[:-1])], dtype=np.int64)  # of each sample's pixels
        arrays = {
            "images": np.concatenate([image.reshape(-1, 3) for image in images]),
            "masks": np.concatenate([mask.reshape(-1) for mask in masks]),
            "channels": np.array([IMAGENET_MEAN, IMAGENET_STD], dtype),
        }
        self.arrays = {name: device.constant(array) for name, array in arrays.items()}

    def _batches(self, epoch_number: int, batches: list[list[int]]) -> Generator[Batch, None, None]:
        for indices in batches:
            tables: dict[str, np.ndarray] = {
                "starts": self.starts[indices],
                "sizes": self.sizes[indices],
                "views": np.array([self._view(epoch_number, index) for index in indices], np.int32),
                "tones": np.array([(1, 0)] * len(indices), self.dtype),  # contrast and brightness as they are
            }
            op = AugmentForward.plan(len(indices), len(self.arrays["masks"]), self.views.size, self.dtype)
            uploaded = {name: self.device.upload(table) for name, table in tables.items()}
            made = op(self.device, **self.arrays, **uploaded)
            yield Batch(made.y, made.labels, tuple(self.names[index] for index in indices))

    def _view(self, epoch_number: int, index: int) -> tuple[int, ...]:
        view = self.views.view(sample_rng(self.seed, epoch_number, index), tuple(self.sizes[index].tolist()))
        if max(view.scaled) >= 2**30:  # the kernel counts in 32 bits
            raise DataError(f"{self.names[index]}: scaled to {view.scaled} pixels; expected sides below 2^30.")
        return (*view.scaled, view.top, view.left, view.flip)
