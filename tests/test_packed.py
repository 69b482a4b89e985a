"""Training batches made on the device: the same views as TrainTransform's, held against Pillow."""

import numpy as np
import pytest
from support.kernels import needs_compiler

from segnet_scratch.data import IMAGENET_MEAN, IMAGENET_STD, VOID, TrainTransform, sample_rng
from segnet_scratch.data.packed import augment, pack
from segnet_scratch.data.transforms import View
from segnet_scratch.errors import DataError, DTypeError, ShapeError
from segnet_scratch.runtime.devices import get_device

SIZES = ((61, 47), (30, 90), (7, 200), (120, 33))
DEVICES = ["numpy", pytest.param("host", marks=needs_compiler)]
LEVEL = 1 / 255 / IMAGENET_STD  # one step of a byte


def samples(seed=0):
    """Noise, which hides nothing, with labels 0 to 20 and void."""
    rng = np.random.default_rng(seed)
    pairs = [(rng.integers(0, 256, (*s, 3), np.uint8), rng.integers(0, 22, s, np.uint8)) for s in SIZES]
    return [(image, np.where(mask == 21, VOID, mask).astype(np.uint8)) for image, mask in pairs]


def clear_of_borders(view, source, size):
    """Where no position falls exactly on the border of two source pixels: there rounding decides Pillow's label."""
    rows, columns = (2 * (np.arange(n) + first) + 1 for n, first in zip(size, (view.top, view.left), strict=True))
    if view.flip:
        columns = 2 * view.scaled[1] - columns
    clear = [p * n % (2 * s) != 0 for p, n, s in zip((rows, columns), source, view.scaled, strict=True)]
    return np.logical_and.outer(*clear)


def made(device, pairs, views, size, dtype=np.float32):
    chosen = get_device(device)
    arrays = [chosen.upload(a) for a in pack(pairs, views, dtype)]
    return [chosen.download(a) for a in augment(chosen, arrays, size)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("size", "scale"), [((48, 40), (0.5, 2.0)), ((33, 65), (0.2, 0.6)), ((24, 24), (1.0, 1.0)), ((96, 128), (1.5, 3.0))]
)
def test_it_is_what_the_transform_does(device, size, scale):
    transform, pairs, compared = TrainTransform(size, scale), samples(), []
    for epoch in range(3):
        rngs = [[sample_rng(5, epoch, index) for index in range(len(pairs))] for _ in range(2)]
        views = [transform.view(rng, mask.shape) for rng, (_, mask) in zip(rngs[0], pairs, strict=True)]
        images, labels = made(device, pairs, views, size)
        for i, rng in enumerate(rngs[1]):
            image, mask = transform(*pairs[i], rng)
            clear = clear_of_borders(views[i], pairs[i][1].shape, size)
            np.testing.assert_array_equal(labels[i][clear], mask[clear])
            compared.append(clear.mean())
            padded = (image == 0).all(2)
            np.testing.assert_array_equal(images[i][padded], 0)
            # Pillow rounds to bytes after each of two passes, with weights of 22 bits.
            assert (np.abs(images[i] - image) <= 1.05 * LEVEL).all()
    assert images.dtype == np.float32
    assert np.mean(compared) > 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_tones(device):
    image = np.array([[[0, 51, 102], [153, 204, 255]]], np.uint8)
    views = [View((1, 2), contrast=0.5, brightness=0.125), View((1, 2), contrast=3.0), View((1, 2), flip=True)]
    images, _ = made(device, [(image, np.zeros((1, 2), np.uint8))] * 3, views, (1, 2), np.float64)
    plain = image / 255
    expected = [0.5 * (plain - 0.5) + 0.625, np.clip(3 * (plain - 0.5) + 0.5, 0, 1), plain[:, ::-1]]
    np.testing.assert_allclose(images * IMAGENET_STD + IMAGENET_MEAN, expected, atol=1e-7)


def test_what_cannot_be_packed():
    (image, mask), view = samples()[0], View((5, 5))
    for pairs, views, error in (
        ([], [], ShapeError),
        ([(image, mask)], [view, view], ShapeError),
        ([(image, mask[1:])], [view], ShapeError),
        ([(image.astype(np.float32), mask)], [view], DTypeError),
        ([(image, mask)], [View((0, 5))], DataError),
        ([(image, mask)], [View((5, 5), top=2**31)], DataError),
    ):
        with pytest.raises(error):
            pack(pairs, views)
