"""A small network and a slow bilinear resize, for the tests of evaluation and inference."""

import numpy as np

from segnet_scratch import SegNetBasic
from segnet_scratch.inference import Segmenter


def network(classes=6, device="numpy", cls=SegNetBasic, **options):
    """A network with statistics and biases that are not those of a fresh one, so that evaluation mode shows.

    The statistics are those of noise, so that logits are of the size that a trained network's have.
    """
    rng = np.random.default_rng(0)
    source = cls(classes, 1 / 16, "numpy", **options)
    for _ in range(20):  # a running mean forgets its start slowly
        source(rng.standard_normal((2, 32, 32, 3)).astype(np.float32))
    state = {
        name: array + (0.1 * rng.random(array.shape, np.float32) if name.endswith("bias") else 0)
        for name, array in source.state_dict().items()
    }
    model = cls(classes, 1 / 16, device, **options)
    model.load_state_dict(state)
    return model.eval()


def segment(model, image, size, inference=None, with_logits=False):
    """What a Segmenter finds in one image."""
    return Segmenter(model, size, inference)(image, with_logits)


def bilinear(x, height, width):
    """x (h, w, c) resized, pixel by pixel: centres at half-integers, what lies outside repeats the border."""
    y = np.empty((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            row = min(max((i + 0.5) * x.shape[0] / height - 0.5, 0), x.shape[0] - 1)
            column = min(max((j + 0.5) * x.shape[1] / width - 0.5, 0), x.shape[1] - 1)
            top, left = int(row), int(column)
            below, right = min(top + 1, x.shape[0] - 1), min(left + 1, x.shape[1] - 1)
            v, u = row - top, column - left
            upper = (1 - u) * x[top, left] + u * x[top, right]
            lower = (1 - u) * x[below, left] + u * x[below, right]
            y[i, j] = (1 - v) * upper + v * lower
    return y


def softmax(logits):
    """float64, over the last axis."""
    powers = np.exp(np.asarray(logits, float) - np.max(logits, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def confusion_of(truth, prediction, classes):
    """The confusion matrix of two label maps, pixel by pixel: rows the truth, without its void (255)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth[truth != 255], prediction[truth != 255]), 1)
    return counts
