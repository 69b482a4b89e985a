"""Batches made on the device: those of the loader but for rounding, and runs that learn and go on from them."""

import numpy as np
import pytest
from support.kernels import needs_compiler
from support.training import assert_same_run, losses, start, train

from segnet_scratch.config import Config, check_resume
from segnet_scratch.data import IMAGENET_STD, VOID, ColourJitter, Loader, TrainTransform, VOCDataset, sample_rng
from segnet_scratch.data.on_device import DeviceLoader
from segnet_scratch.errors import ConfigError, DataError
from segnet_scratch.runtime.devices import get_device

TRANSFORM = TrainTransform((40, 56), (0.75, 1.5))


SIZES = ((61, 47), (30, 90), (7, 200), (120, 33))
LEVEL = 1 / 255 / IMAGENET_STD  # one step of a byte


class Noise:
    """Hides nothing; labels are 0 to 20 and void. An id is the number of the sample."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.pairs = [(rng.integers(0, 256, (*s, 3), np.uint8), rng.integers(0, 22, s, np.uint8)) for s in SIZES]
        for _, mask in self.pairs:
            mask[mask == 21] = VOID

    def __len__(self):
        return len(self.pairs)

    def sample(self, index):
        return *self.pairs[index], str(index)


def clear_of_borders(view, source, size):
    """Where no position falls exactly on the border of two source pixels: there rounding decides Pillow's label."""
    rows, columns = (2 * (np.arange(n) + first) + 1 for n, first in zip(size, (view.top, view.left), strict=True))
    if view.flip:
        columns = 2 * view.scaled[1] - columns
    clear = [p * n % (2 * s) != 0 for p, n, s in zip((rows, columns), source, view.scaled, strict=True)]
    return np.logical_and.outer(*clear)


@pytest.mark.parametrize("device", ["numpy", pytest.param("host", marks=needs_compiler)])
@pytest.mark.parametrize(
    ("size", "scale"), [((48, 40), (0.5, 2.0)), ((33, 65), (0.2, 0.6)), ((24, 24), (1.0, 1.0)), ((96, 128), (1.5, 3.0))]
)
def test_a_sample_is_what_the_transform_makes_of_it(device, size, scale):
    data, transform, device, compared = Noise(), TrainTransform(size, scale), get_device(device), []
    loader = DeviceLoader(data, transform, len(data), device, seed=5)
    for epoch in range(3):
        (batch,) = loader.epoch(epoch)
        images, labels = device.download(batch.images), device.download(batch.labels)
        assert images.dtype == np.float32
        for found, label, index in zip(images, labels, map(int, batch.ids), strict=True):
            image, mask = transform(*data.pairs[index], sample_rng(5, epoch, index))
            view = transform.view(sample_rng(5, epoch, index), SIZES[index])
            clear = clear_of_borders(view, SIZES[index], size)
            np.testing.assert_array_equal(label[clear], mask[clear])
            compared.append(clear.mean())
            np.testing.assert_array_equal(found[(image == 0).all(2)], 0)  # what is padded
            # Pillow rounds to bytes after each of two passes, with weights of 22 bits.
            assert (np.abs(found - image) <= 1.05 * LEVEL).all()
    assert np.mean(compared) > 0.5


def test_batches_are_those_of_the_loader(sample):
    dataset, device = VOCDataset(sample, "train"), get_device("numpy")
    ours = DeviceLoader(dataset, TRANSFORM, 3, device, seed=5)
    theirs = Loader(dataset, TRANSFORM, 3, seed=5, workers=0)
    assert ours.batches_per_epoch == theirs.batches_per_epoch == 3
    for epoch, first in ((0, 0), (1, 2)):
        for batch, expected in zip(ours.epoch(epoch, first), theirs.epoch(epoch, first), strict=True):
            assert batch.ids == expected.ids
            assert (device.download(batch.labels) == expected.labels).mean() > 0.99


def test_a_side_that_the_kernel_cannot_count_is_refused():
    transform = TrainTransform((40, 40), short_side=(2**30, 2**30))
    with pytest.raises(DataError, match=r"scaled to .* below 2\^30"):
        next(DeviceLoader(Noise(), transform, 4, get_device("numpy")).epoch(0))


def test_a_run_learns_what_it_learns_from_the_loader(sample, tmp_path):
    for cache in ("none", "device"):
        train(sample, tmp_path / cache, steps=8, cache=cache)
    np.testing.assert_allclose(losses(tmp_path / "device"), losses(tmp_path / "none"), rtol=0.05)


@pytest.mark.parametrize("engine", [{}, {"engine": "fused", "width": 1 / 8}], ids=["layers", "fused"])
def test_a_run_goes_on_with_the_same_bits(sample, tmp_path, engine):
    settings = {"cache": "device", "steps": 6, "checkpoint_every": 3, "validate_every": 3, **engine}
    train(sample, tmp_path / "whole", **settings)
    train(sample, tmp_path / "parts", **settings | {"steps": 3})
    train(sample, tmp_path / "parts", resume=True, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_it_does_not_do_is_refused(sample, tmp_path):
    dataset = VOCDataset(sample, "train")
    jitter = TrainTransform((40, 56), jitter=ColourJitter(saturation=0.5))
    with pytest.raises(ConfigError, match=r'cache = "device": expected no colour jitter'):
        DeviceLoader(dataset, jitter, 2, get_device("numpy"))
    with pytest.raises(ConfigError, match="no colour jitter"):
        start(sample, tmp_path / "run", cache="device", hue=0.1, steps=1)
    check_resume(Config(cache="none"), Config(cache="memory"))
    for caches in (("none", "device"), ("device", "disk")):
        with pytest.raises(ConfigError, match=r"cache \(was"):
            check_resume(*(Config(cache=cache) for cache in caches))
