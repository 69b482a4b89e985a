"""Batch normalisation of (N, H, W, C) arrays, per channel over images and pixels, and its gradient.

    y = (x - mean) * inv_std * weight + bias,  inv_std = 1 / sqrt(variance + eps)

Statistics are taken per chunk around the chunk's own mean and merged in float64, because the mean of squares
minus the square of the mean cancels (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance",
1983, equations 1.7 and 2.1).

A chunk of pixels goes through all steps while it is in a cache. Vectors over channels are repeated to the
length of a chunk: NumPy is about twice as fast over one long run as over the channels of pixel after pixel.

All arrays are C-contiguous and of one float type, and outputs do not overlap inputs; `ops/normalisation/batch_norm.py`
checks shapes.
"""

from collections.abc import Callable, Sequence

import numpy as np

from segnet_scratch.runtime.workers import CHUNK_VALUES, parallel_slices, scratch


def backward_sums(x: np.ndarray, dy: np.ndarray, mean: np.ndarray, inv_std: np.ndarray) -> np.ndarray:
    """Sum of dy, sum of dy * x_hat: float64 (2, C)."""
    sums = np.empty((_chunks(x), 2, x.shape[3]), np.float64)

    def body(chunk: int, x: np.ndarray, dy: np.ndarray, means: np.ndarray) -> None:
        product, ones = scratch("product", x.shape, x.dtype), np.ones(len(x), x.dtype)
        np.subtract(x, means, out=product)
        product *= dy
        sums[chunk] = ones @ dy, ones @ product

    _in_chunks(body, (x, dy), (mean,))
    totals = sums.sum(axis=0)
    totals[1] *= inv_std
    return totals


def backward_apply(
    x: np.ndarray,
    dy: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    dy_mean: np.ndarray,
    dx: np.ndarray,
) -> None:
    """Writes dx (N, H, W, C) from the means of dy and of dy * x_hat, float64 (2, C)."""

    def body(chunk: int, x: np.ndarray, dy: np.ndarray, dx: np.ndarray, *vectors: np.ndarray) -> None:
        means, slopes, dy_means, scales = vectors
        np.subtract(x, means, out=dx)
        dx *= slopes
        dx += dy_means
        np.subtract(dy, dx, out=dx)
        dx *= scales

    slopes, dy_means = ((dy_mean[1] * inv_std).astype(x.dtype), dy_mean[0].astype(x.dtype))
    _in_chunks(body, (x, dy, dx), (mean, slopes, dy_means, weight * inv_std))


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance per channel, float64."""
    counts, means, squares = np.empty((3, _chunks(x), x.shape[3]), np.float64)

    def body(chunk: int, x: np.ndarray) -> None:
        ones, count = np.ones(len(x), x.dtype), len(x)
        rough_mean = (ones @ x) / x.dtype.type(count)
        centred = scratch("product", x.shape, x.dtype)
        # Two long passes: to fill the means in first is faster than to subtract them pixel by pixel.
        centred[...] = rough_mean
        np.subtract(x, centred, out=centred)
        # What is left of the mean corrects its rounding error.
        rest = (ones @ centred).astype(np.float64) / count
        np.multiply(centred, centred, out=centred)
        counts[chunk], means[chunk] = count, rough_mean + rest
        squares[chunk] = (ones @ centred) - count * rest**2

    _in_chunks(body, (x,))
    rows = x.size // x.shape[3]
    mean = (counts * means).sum(axis=0) / rows
    between_chunks = counts * (means - mean) ** 2
    return mean, (squares + between_chunks).sum(axis=0) / rows


def normalise(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
    """Writes y = (x - mean) * scale + bias.

    To fold the mean into the bias would save a step, but lose digits where it exceeds the deviation.
    """

    def body(chunk: int, x: np.ndarray, y: np.ndarray, *vectors: np.ndarray) -> None:
        means, scales, biases = vectors
        np.subtract(x, means, out=y)
        y *= scales
        y += biases

    _in_chunks(body, (x, y), (mean, scale, bias))


def _step(x: np.ndarray) -> int:
    """Pixels in a chunk of x (N, H, W, C)."""
    return max(1, min(x.size // x.shape[3], CHUNK_VALUES // x.shape[3]))


def _chunks(x: np.ndarray) -> int:
    return -(-x.size // (x.shape[3] * _step(x)))


def _in_chunks(body: Callable[..., None], maps: Sequence[np.ndarray], vectors: Sequence[np.ndarray] = ()) -> None:
    """Calls `body(number, *pixels, *repeated)` for each chunk of maps (N, H, W, C): pixels and vectors (pixels, C)."""
    step, pixels = _step(maps[0]), [map_.reshape(-1, map_.shape[3]) for map_ in maps]
    repeated = [np.tile(vector, (step, 1)) for vector in vectors]

    def of_part(part: slice) -> None:
        count = part.stop - part.start
        body(part.start // step, *(of[part] for of in pixels), *(of[:count] for of in repeated))

    parallel_slices(len(pixels[0]), step, of_part)
