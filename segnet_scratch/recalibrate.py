"""Batch-norm statistics of a trained network, counted anew: what the authors of SegNet did by hand before testing.

The running statistics of training are an average that forgets: it knows the last dozens of batches, and the weights
moved meanwhile. Here the weights stand still and every batch counts alike.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.errors import DataError, TrainingError
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.nn.modules import BatchNorm2d
from segnet_scratch.segnet import SegNet


@dataclass
class _Moments:
    """Count, mean and sum of squared distances from it, merged batch by batch (Chan, Golub, LeVeque 1983)."""

    count: int = 0
    mean: Any = 0.0
    squares: Any = 0.0

    def merge(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        total, distance = self.count + count, mean - self.mean
        self.mean = self.mean + distance * (count / total)
        self.squares = self.squares + squares + distance**2 * (self.count * count / total)
        self.count = total


def recalibrate(model: SegNet, batches: Iterable[np.ndarray]) -> int:
    """Replaces all running means and variances by those over all the given batches; returns the number of images.

    batches: images (n, h, w, 3) as the network takes them, one at least. Each layer normalises a batch by the batch's
    own statistics, as in training; those are merged in double, weighed by their pixels, and the variance is the
    unbiased one. Dropout is off, as in inference. The network is left in evaluation mode. TrainingError where batch
    norm is folded into the convolutions, DataError without a batch.
    """
    if model.folded:
        raise TrainingError("recalibrate: batch norm is folded into this network; load it without fold=True")
    layers, images = model.named_modules(BatchNorm2d), 0
    moments = {name: _Moments() for name in layers}
    with no_grad(), _statistics_of_one_batch(model, layers):
        for batch in batches:
            model(batch.astype(model.dtype, copy=False))
            images += len(batch)
            for name, layer in layers.items():
                count = len(batch) * _pixels(name, batch.shape[1:3], model.pooling)
                arrays = (model.device.download(b.data) for b in (layer.running_mean, layer.running_var))
                mean, var = (array.astype(np.float64) for array in arrays)
                moments[name].merge(count, mean, var * (count - 1))
    if not images:
        raise DataError("recalibrate: there is no batch of images; give one at least")
    for name, layer in layers.items():
        total = moments[name]
        model.device.write(layer.running_mean.data, total.mean.astype(model.dtype))
        model.device.write(layer.running_var.data, (total.squares / (total.count - 1)).astype(model.dtype))
    return images


@contextmanager
def _statistics_of_one_batch(model: SegNet, layers: dict[str, BatchNorm2d]) -> Iterator[None]:
    """Within this context a forward pass leaves the batch's own statistics in the running ones."""
    model.eval()
    momenta = {name: layer.momentum for name, layer in layers.items()}
    for layer in layers.values():
        layer.training, layer.momentum = True, 1.0
        for buffer in (layer.running_mean, layer.running_var):
            # What is there counts 0 times, which is not 0 where it is infinity.
            model.device.write(buffer.data, np.zeros(buffer.data.shape, model.dtype))
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.training, layer.momentum = False, momenta[name]


def _pixels(layer: str, size: tuple[int, ...], pooling: str) -> int:
    """Pixels of the map that a layer, `encoder.2.1.bn`, sees of one image: stage s works behind s - 1 pools."""
    each = 2 ** (int(layer.split(".")[1]) - 1)
    height, width = (side // each if pooling == "floor" else -(-side // each) for side in size)
    return height * width
