"""Training batches made on the device, from decoded pictures that lie there: the setting `cache = "device"`."""

from collections.abc import Generator

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.data.loader import Batch, Loader, sample_rng
from segnet_scratch.data.packed import augment, pack
from segnet_scratch.data.transforms import ColourJitter, TrainTransform, View
from segnet_scratch.data.voc import VOCDataset
from segnet_scratch.errors import ConfigError
from segnet_scratch.ops.loss.cross_entropy import check_labels
from segnet_scratch.runtime.devices import Device


class DeviceLoader(Loader):
    """A Loader whose batches are arrays of a device, cut out of the whole split there (ops/resampling/augment.py).

    Order and views are those of a Loader; pixels differ by Pillow's rounding to bytes. The split is decoded and
    uploaded once: 4 bytes a pixel. ConfigError for colour jitter, which the kernel does otherwise; DataError for a
    sample that cannot be read.
    """

    def __init__(
        self,
        dataset: VOCDataset,
        transform: TrainTransform,
        batch: int,
        device: Device,
        dtype: DTypeLike = np.float32,
        seed: int = 0,
        drop_last: bool = False,
        skip_bad: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(
            dataset, transform, batch, seed, drop_last=drop_last, workers=0, skip_bad=skip_bad, share=share
        )
        if transform.jitter != ColourJitter():
            raise ConfigError('cache = "device": expected no colour jitter, got some; set brightness, ... to 0.')
        self.views, self.device, self.dtype = transform, device, dtype
        samples = [self.sample(index) for index in range(len(dataset))]
        self.names = [name for _, _, name in samples]
        pairs = [(image, check_labels(mask, dataset.classes)) for image, mask, _ in samples]
        whole = pack(pairs, [View((1, 1))] * len(pairs), dtype)
        self.starts, self.sizes = whole.starts, whole.sizes
        self.images, self.masks, self.channels = (
            device.constant(array) for array in (whole.images, whole.masks, whole.channels)
        )

    def _batches(self, epoch_number: int, batches: list[list[int]]) -> Generator[Batch, None, None]:
        for indices in batches:
            views = [self._view(epoch_number, index) for index in indices]
            tables = (
                self.starts[indices],
                self.sizes[indices],
                np.array([(*v.scaled, v.top, v.left, v.flip) for v in views], np.int32),
                np.array([(v.contrast, v.brightness) for v in views], self.dtype),
            )
            arrays = (self.images, self.masks, *map(self.device.upload, tables), self.channels)
            images, labels = augment(self.device, arrays, self.views.size)
            yield Batch(images, labels, tuple(self.names[index] for index in indices))

    def _view(self, epoch_number: int, index: int) -> View:
        height, width = (int(side) for side in self.sizes[index])
        return self.views.view(sample_rng(self.seed, epoch_number, index), (height, width))
