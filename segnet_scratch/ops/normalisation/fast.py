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

import numpy as np

from segnet_scratch.runtime.workers import CHUNK_VALUES, parallel_slices, scratch


@np.errstate(all="ignore")
def training_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    y: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    variance: np.ndarray,
    eps: float,
) -> None:
    """Normalises x (N, H, W, C) by its own statistics; writes y like x, and mean, inv_std, variance (C,).

    The variance is the biased one, divided by N*H*W; weight and bias are (C,).
    """
    total_mean, total_variance = statistics(x)
    mean[...] = total_mean
    variance[...] = total_variance
    inv_std[...] = 1 / np.sqrt(total_variance + eps)
    normalise(x, mean, weight * inv_std, bias, y)


@np.errstate(all="ignore")
def evaluation_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    y: np.ndarray,
    eps: float,
) -> None:
    """Normalises x (N, H, W, C) by given statistics (C,) and writes y like x; weight and bias are (C,)."""
    normalise(x, running_mean, weight / np.sqrt(running_var + eps), bias, y)


@np.errstate(all="ignore")
def backward(
    x: np.ndarray,
    dy: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    dx: np.ndarray,
    dweight: np.ndarray,
    dbias: np.ndarray,
) -> None:
    """Writes the gradients of training_forward: dx like x (N, H, W, C), dweight and dbias (C,).

    With x_hat = (x - mean) * inv_std and P = N*H*W: dbias = sum dy and dweight = sum dy * x_hat. Since mean
    and variance depend on x, dx = weight * inv_std * (dy - dbias / P - x_hat * dweight / P).
    """
    sums = backward_sums(x, dy, mean, inv_std)
    dbias[...], dweight[...] = sums
    backward_apply(x, dy, weight, mean, inv_std, sums / (x.size // x.shape[3]), dx)


@np.errstate(all="ignore")
def backward_sums(x: np.ndarray, dy: np.ndarray, mean: np.ndarray, inv_std: np.ndarray) -> np.ndarray:
    """Sum of dy, sum of dy * x_hat: float64 (2, C)."""
    pixels, dy_pixels = _pixels(x), _pixels(dy)
    step = _chunk_pixels(pixels)
    ones = np.ones(step, x.dtype)
    means = _repeat(mean, step)
    sums = np.empty((2, -(-len(pixels) // step), x.shape[3]), np.float64)

    def gather(part: slice) -> None:
        chunk, count = part.start // step, part.stop - part.start
        product = scratch("product", (count, x.shape[3]), x.dtype)
        np.subtract(pixels[part], means[:count], out=product)
        product *= dy_pixels[part]
        sums[0, chunk] = ones[:count] @ dy_pixels[part]
        sums[1, chunk] = ones[:count] @ product

    parallel_slices(len(pixels), step, gather)
    totals = sums.sum(axis=1)
    totals[1] *= inv_std
    return totals


@np.errstate(all="ignore")
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
    pixels, dy_pixels, dx_pixels = _pixels(x), _pixels(dy), _pixels(dx)
    step = _chunk_pixels(pixels)
    means = _repeat(mean, step)
    slopes = _repeat((dy_mean[1] * inv_std).astype(x.dtype), step)
    dy_means = _repeat(dy_mean[0].astype(x.dtype), step)
    scales = _repeat(weight * inv_std, step)

    def apply(part: slice) -> None:
        count = part.stop - part.start
        out = dx_pixels[part]
        np.subtract(pixels[part], means[:count], out=out)
        out *= slopes[:count]
        out += dy_means[:count]
        np.subtract(dy_pixels[part], out, out=out)
        out *= scales[:count]

    parallel_slices(len(pixels), step, apply)


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance per channel, float64."""
    pixels = _pixels(x)
    step = _chunk_pixels(pixels)
    chunks = -(-len(pixels) // step)
    counts = np.empty((chunks, 1), np.float64)
    means, squares = np.empty((2, chunks, x.shape[3]), np.float64)
    ones = np.ones(step, x.dtype)

    def body(part: slice) -> None:
        chunk, count = part.start // step, part.stop - part.start
        rough_mean = (ones[:count] @ pixels[part]) / x.dtype.type(count)
        centred = scratch("product", (count, x.shape[3]), x.dtype)
        # Two long passes: to fill the means in first is faster than to subtract them pixel by pixel.
        centred[...] = rough_mean
        np.subtract(pixels[part], centred, out=centred)
        # What is left of the mean corrects its rounding error.
        rest = (ones[:count] @ centred).astype(np.float64) / count
        np.multiply(centred, centred, out=centred)
        counts[chunk] = count
        means[chunk] = rough_mean + rest
        squares[chunk] = (ones[:count] @ centred) - count * rest**2

    parallel_slices(len(pixels), step, body)
    mean = (counts * means).sum(axis=0) / len(pixels)
    between_chunks = counts * (means - mean) ** 2
    return mean, (squares + between_chunks).sum(axis=0) / len(pixels)


def normalise(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
    """Writes y = (x - mean) * scale + bias.

    To fold the mean into the bias would save a step, but lose digits where it exceeds the deviation.
    """
    pixels, y_pixels = _pixels(x), _pixels(y)
    step = _chunk_pixels(pixels)
    means, scales, biases = (_repeat(vector, step) for vector in (mean, scale, bias))

    def body(part: slice) -> None:
        count = part.stop - part.start
        out = y_pixels[part]
        np.subtract(pixels[part], means[:count], out=out)
        out *= scales[:count]
        out += biases[:count]

    parallel_slices(len(pixels), step, body)


def _pixels(x: np.ndarray) -> np.ndarray:
    """(N, H, W, C) seen as (N*H*W, C)."""
    return x.reshape(-1, x.shape[3])


def _chunk_pixels(pixels: np.ndarray) -> int:
    return max(1, min(len(pixels), CHUNK_VALUES // pixels.shape[1]))


def _repeat(vector: np.ndarray, count: int) -> np.ndarray:
    """The vector (C,) `count` times: (count, C)."""
    return np.tile(vector, (count, 1))
