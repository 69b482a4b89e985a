"""Batches made on the device: those of the loader but for rounding, and runs that learn and go on from them."""

import numpy as np
import pytest
from support.training import assert_same_run, losses, start, train

from segnet_scratch.config import Config, check_resume
from segnet_scratch.data import ColourJitter, Loader, TrainTransform, VOCDataset
from segnet_scratch.data.on_device import DeviceLoader
from segnet_scratch.errors import ConfigError
from segnet_scratch.runtime.devices import get_device

TRANSFORM = TrainTransform((40, 56), (0.75, 1.5))


@pytest.mark.parametrize("device", ["numpy", "host"])
def test_the_batches_are_those_of_the_loader(sample, device):
    dataset, device = VOCDataset(sample, "train"), get_device(device)
    ours = DeviceLoader(dataset, TRANSFORM, 3, device, seed=5)
    theirs = Loader(dataset, TRANSFORM, 3, seed=5, workers=0)
    assert ours.batches_per_epoch == theirs.batches_per_epoch == 3
    for epoch, first in ((0, 0), (1, 2)):
        batches = list(ours.epoch(epoch, first))
        for batch, expected in zip(batches, theirs.epoch(epoch, first), strict=True):
            assert batch.ids == expected.ids
            images, labels = device.download(batch.images), device.download(batch.labels)
            assert images.dtype == np.float32
            # Pillow rounds to bytes twice; a unit of a byte is 1/255 of the range, over deviations of about 1/4.
            assert np.abs(images - expected.images).max() <= 2.5 / 255 / 0.224
            assert (labels == expected.labels).mean() > 0.99


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
