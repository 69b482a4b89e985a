"""The fast NumPy implementations in segnet_scratch/cpu against plain references written here, in float64.

Integer values make results exact, so that they compare with ==; random ones are held to bounds that follow from the
number of summed products. Small chunk sizes are forced as well: the borders between chunks are where such code errs.
"""

import ast
import contextlib
import itertools
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl

from segnet_scratch.errors import ConfigError
from segnet_scratch.ops.convolution import fast as conv2d
from segnet_scratch.ops.convolution import winograd
from segnet_scratch.ops.elementwise import fast as activation
from segnet_scratch.ops.loss import fast as loss
from segnet_scratch.ops.normalisation import fast as batch_norm
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.runtime import workers

FLOATS = [np.float32, np.float64]


def assert_equal(actual, expected):
    """Same shape and values everywhere; NaN equals NaN and nothing else."""
    assert actual.shape == expected.shape
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} values differ, first at {np.argwhere(~same)[0]}"


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.tobytes() == expected.tobytes()


def assert_within(actual, expected, bound):
    """|actual - expected| <= bound everywhere; a NaN fails."""
    assert actual.shape == expected.shape
    error = np.abs(actual.astype(np.float64) - expected)
    good = error <= bound
    assert good.all(), f"{np.count_nonzero(~good)} of {good.size} values are off, the worst by {error.max()}"


def unset(shape, dtype):
    """An output that shows any value that was not written."""
    return np.full(shape, 99 if np.dtype(dtype) == np.uint8 else np.nan, dtype)


@pytest.fixture(params=["usual_chunks", "tiny_chunks"])
def chunking(request, monkeypatch):
    """Runs a test a second time with chunks so small that every array is cut into many."""
    if request.param == "tiny_chunks":
        for module in (activation, batch_norm, loss, pooling):
            monkeypatch.setattr(module, "CHUNK_VALUES", 24)
        monkeypatch.setattr(conv2d, "_PATCH_BYTES", 3000)
        monkeypatch.setattr(conv2d, "_BIAS_PIXELS", 5)
        monkeypatch.setattr(winograd, "_BYTES_TOGETHER", 1 << 16)
        monkeypatch.setattr(winograd, "_TILES_ALONE", 3)
        monkeypatch.setattr(winograd, "_FILTER_BLOCK", 5)


@pytest.fixture(params=["much_to_multiply", "little_to_multiply"])
def way(request, monkeypatch):
    """Runs a test with Winograd wherever it can go, as for large maps, and without it, as for small ones."""
    monkeypatch.setattr(winograd, "_LEAST_PRODUCTS", 0 if request.param == "much_to_multiply" else 1 << 62)


# --- convolution -------------------------------------------------------------------------------------------------


def patches(x, kernel, stride, padding):
    """Yields i, j and the patches (N, kh, kw, C) under the kernel at output pixel (i, j)."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = range(0, padded.shape[1] - kernel[0] + 1, stride)
    columns = range(0, padded.shape[2] - kernel[1] + 1, stride)
    for (i, top), (j, left) in itertools.product(enumerate(rows), enumerate(columns)):
        yield i, j, padded[:, top : top + kernel[0], left : left + kernel[1]]


def output_shape(x, weight, stride, padding):
    sizes = [(x.shape[axis] + 2 * padding - weight.shape[axis]) // stride + 1 for axis in (1, 2)]
    return (len(x), *sizes, len(weight))


def reference_forward(x, weight, bias, stride, padding):
    y = np.zeros(output_shape(x, weight, stride, padding))
    for i, j, patch in patches(x, weight.shape[1:3], stride, padding):
        for o, one in enumerate(weight.astype(np.float64)):
            y[:, i, j, o] = (patch * one).sum(axis=(1, 2, 3))
    return y if bias is None else y + bias


def reference_backward_data(dy, weight, shape, stride, padding):
    padded = np.zeros((shape[0], shape[1] + 2 * padding, shape[2] + 2 * padding, shape[3]))
    _, kh, kw, _ = weight.shape
    for n, i, j, o in np.ndindex(dy.shape):
        patch = padded[n, i * stride : i * stride + kh, j * stride : j * stride + kw]
        patch += float(dy[n, i, j, o]) * weight[o].astype(np.float64)
    return padded[:, padding : padding + shape[1], padding : padding + shape[2]]


def reference_backward_weight(x, dy, shape, stride, padding):
    dweight = np.zeros(shape)
    for i, j, patch in patches(x, shape[1:3], stride, padding):
        for o in range(shape[0]):
            dweight[o] += (dy[:, i, j, o].astype(np.float64)[:, None, None, None] * patch).sum(axis=0)
    return dweight


# (N, H, W, C), (O, kh, kw), stride, padding
CONVOLUTIONS = [
    pytest.param((1, 1, 1, 1), (1, 1, 1), 1, 0, id="one value"),
    pytest.param((2, 5, 7, 3), (4, 3, 3), 1, 1, id="few channels, first layer of SegNet"),
    pytest.param((2, 6, 5, 4), (3, 3, 3), 1, 0, id="no padding"),
    pytest.param((1, 4, 6, 2), (3, 3, 3), 1, 3, id="padding wider than the kernel reaches: dx crops dy"),
    pytest.param((3, 1, 11, 2), (2, 7, 7), 1, 3, id="kernel larger than the map"),
    pytest.param((2, 7, 9, 3), (2, 3, 3), 2, 1, id="stride 2"),
    pytest.param((2, 8, 9, 2), (3, 3, 3), 2, 0, id="stride 2, last row and column unused"),
    pytest.param((1, 9, 8, 2), (2, 7, 7), 2, 3, id="stride 2, wide kernel"),
    pytest.param((1, 8, 11, 2), (3, 2, 2), 3, 0, id="stride larger than the kernel leaves gaps"),
    pytest.param((2, 6, 7, 2), (3, 2, 4), 1, 1, id="even kernel, not square"),
    pytest.param((2, 7, 6, 3), (2, 1, 5), 2, 3, id="flat kernel, stride 2"),
    pytest.param((5, 3, 2, 4), (3, 1, 1), 1, 0, id="1x1 kernel"),
    pytest.param((1, 1, 1, 32), (33, 3, 3), 1, 1, id="Winograd, one pixel"),
    pytest.param((2, 5, 7, 33), (32, 3, 3), 1, 1, id="Winograd, odd sizes cut tiles"),
    pytest.param((3, 6, 4, 32), (35, 3, 3), 1, 0, id="Winograd, no padding"),
    pytest.param((1, 3, 13, 37), (32, 3, 3), 1, 3, id="Winograd, padding wider than the kernel reaches"),
    pytest.param((5, 2, 2, 32), (32, 3, 3), 1, 1, id="Winograd, one tile per image"),
    pytest.param((2, 5, 5, 33), (34, 3, 3), 2, 1, id="many channels, stride 2"),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "filters", "stride", "padding"), CONVOLUTIONS)
@pytest.mark.usefixtures("chunking", "way")
def test_convolution_of_integers_is_exact(shape, filters, stride, padding, dtype):
    rng = np.random.default_rng(1)
    x = rng.integers(-4, 5, shape).astype(dtype)
    weight = rng.integers(-4, 5, (*filters, shape[3])).astype(dtype)
    bias = rng.integers(-4, 5, filters[0]).astype(dtype)
    dy = rng.integers(-4, 5, output_shape(x, weight, stride, padding)).astype(dtype)
    inputs = [array.copy() for array in (x, weight, bias, dy)]

    y, y_plain, dx, dweight, dbias = (unset(like.shape, dtype) for like in (dy, dy, x, weight, bias))
    conv2d.forward(x, weight, bias, y, stride, padding)
    conv2d.forward(x, weight, None, y_plain, stride, padding)
    conv2d.backward_data(dy, weight, dx, stride, padding)
    conv2d.backward_weight(x, dy, dweight, stride, padding)
    conv2d.backward_bias(dy, dbias)

    expected = reference_forward(x, weight, None, stride, padding)
    assert_equal(y, expected + bias)
    assert_equal(y_plain, expected)
    assert_equal(dx, reference_backward_data(dy, weight, x.shape, stride, padding))
    assert_equal(dweight, reference_backward_weight(x, dy, weight.shape, stride, padding))
    assert_equal(dbias, dy.astype(np.float64).sum(axis=(0, 1, 2)))
    for before, after in zip(inputs, (x, weight, bias, dy), strict=True):
        assert_same_bits(after, before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "filters", "stride", "padding"), CONVOLUTIONS)
@pytest.mark.usefixtures("way")
def test_convolution_rounds_within_bounds(shape, filters, stride, padding, dtype):
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal(shape).astype(dtype), rng.standard_normal((*filters, shape[3])).astype(dtype)
    bias = rng.standard_normal(filters[0]).astype(dtype)
    dy = rng.standard_normal(output_shape(x, weight, stride, padding)).astype(dtype)
    y, dx, dweight, dbias = (unset(like.shape, dtype) for like in (dy, x, weight, bias))
    conv2d.forward(x, weight, bias, y, stride, padding)
    conv2d.backward_data(dy, weight, dx, stride, padding)
    conv2d.backward_weight(x, dy, dweight, stride, padding)
    conv2d.backward_bias(dy, dbias)

    def check(actual, reference, factors, summed, *arguments):
        products = reference(*(np.abs(factor) for factor in factors), *arguments)
        if winograd.suits(filters[1:], stride, shape[3], dy.shape):
            # Neighbours in a tile share their rounding errors.
            products = products.max()
        bound = 3 * np.finfo(dtype).eps * math.sqrt(summed) * products
        assert_within(actual, reference(*factors, *arguments), bound)

    taps = filters[1] * filters[2]
    pixels = dy.size // filters[0]
    check(y, reference_forward, (x, weight, bias), taps * shape[3], stride, padding)
    check(dx, reference_backward_data, (dy, weight), taps * filters[0], x.shape, stride, padding)
    check(dweight, reference_backward_weight, (x, dy), pixels, weight.shape, stride, padding)
    check(dbias, lambda dy: dy.astype(np.float64).sum(axis=(0, 1, 2)), (dy,), pixels)


def test_convolution_carries_nan_to_every_output_that_sees_it(monkeypatch):
    monkeypatch.setattr(winograd, "_LEAST_PRODUCTS", 0)
    rng = np.random.default_rng(3)
    for channels, reach in ((3, 1), (32, 2)):  # Winograd may carry it one pixel further, within a tile
        x = rng.standard_normal((1, 9, 9, channels)).astype(np.float32)
        x[0, 4, 4, 1] = np.nan
        weight = rng.standard_normal((32, 3, 3, channels)).astype(np.float32)
        y = unset((1, 9, 9, 32), np.float32)
        conv2d.forward(x, weight, None, y, 1, 1)
        assert np.isnan(y[0, 3:6, 3:6]).all()
        y[0, 4 - reach : 5 + reach, 4 - reach : 5 + reach] = 0
        assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("kernel", "stride", "channels_in", "y", "suits"),
    [
        ((3, 3), 1, 64, (4, 224, 224, 64), True),
        ((3, 3), 1, 512, (4, 14, 14, 512), True),
        ((3, 3), 1, 128, (2, 32, 32, 128), True),
        ((3, 3), 1, 128, (2, 32, 30, 128), False),  # 480 tiles
        ((3, 3), 1, 128, (2, 4, 4, 128), False),
        ((3, 3), 1, 31, (4, 224, 224, 64), False),
        ((3, 3), 2, 64, (4, 224, 224, 64), False),
        ((7, 7), 1, 64, (4, 224, 224, 64), False),
    ],
)
def test_winograd_is_taken_where_it_gains(kernel, stride, channels_in, y, suits):
    assert winograd.suits(kernel, stride, channels_in, y) is suits


# --- batch normalisation -----------------------------------------------------------------------------------------

MAPS = [
    pytest.param((1, 1, 2, 1), id="two values"),
    pytest.param((2, 3, 5, 7), id="odd sizes"),
    pytest.param((3, 7, 11, 1), id="one channel"),
    pytest.param((2, 13, 17, 16), id="several chunks when small"),
    pytest.param((1, 1, 3, 700), id="more channels than pixels"),
]


def channel_sum(array):
    """Sum over images and pixels, correctly rounded: it serves float64 inputs too."""
    return np.array([math.fsum(channel) for channel in array.reshape(-1, array.shape[-1]).T])


def per_channel(rng, channels, dtype):
    return rng.uniform(0.5, 2, channels).astype(dtype), rng.standard_normal(channels).astype(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1000], ids=["centred", "mean far from zero"])
@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.usefixtures("chunking")
def test_batch_norm_forward(shape, offset, dtype):
    rng = np.random.default_rng(4)
    channels = shape[3]
    x = (rng.standard_normal(shape) + offset * rng.choice([-1, 1], channels)).astype(dtype)
    weight, bias = per_channel(rng, channels, dtype)
    y = unset(shape, dtype)
    mean, inv_std, variance = unset((3, channels), dtype)
    batch_norm.training_forward(x, weight, bias, y, mean, inv_std, variance, 1e-5)

    exact = x.astype(np.float64)
    pixels = x.size // channels
    exact_mean = channel_sum(exact) / pixels
    exact_variance = channel_sum((exact - exact_mean) ** 2) / pixels
    exact_inv_std = 1 / np.sqrt(exact_variance + 1e-5)
    eps = np.finfo(dtype).eps
    deviation = np.sqrt(exact_variance)
    eps_merging = np.finfo(np.float64).eps  # chunks are merged in float64
    merging = 2 * eps + math.sqrt(pixels) * eps_merging
    assert_within(mean, exact_mean, merging * (np.abs(exact_mean) + deviation))
    of_variance = 4 * eps * math.sqrt(pixels) * exact_variance + 4 * eps_merging * np.abs(exact_mean) * deviation
    assert_within(variance, exact_variance, of_variance)
    assert_within(inv_std, exact_inv_std, (of_variance / exact_variance + eps) * exact_inv_std)
    scaled = (exact - exact_mean) * exact_inv_std * weight
    rounding = 4 * eps * (math.sqrt(pixels) * np.abs(scaled) + np.abs(bias))
    from_mean = 2 * merging * np.abs(exact_mean) * exact_inv_std * weight
    assert_within(y, scaled + bias, rounding + from_mean)

    evaluated = unset(shape, dtype)
    batch_norm.evaluation_forward(x, weight, bias, mean, variance, evaluated, 1e-5)
    assert_within(evaluated, y.astype(np.float64), 4 * eps * (np.abs(scaled) + np.abs(bias)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.usefixtures("chunking")
def test_batch_norm_backward(shape, dtype):
    rng = np.random.default_rng(5)
    channels = shape[3]
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    x += 3
    weight, bias = per_channel(rng, channels, dtype)
    mean, inv_std, variance = unset((3, channels), dtype)
    batch_norm.training_forward(x, weight, bias, unset(shape, dtype), mean, inv_std, variance, 1e-5)
    dx = unset(shape, dtype)
    dweight, dbias = unset((2, channels), dtype)
    batch_norm.backward(x, dy, weight, mean, inv_std, dx, dweight, dbias)

    # The chain rule step by step, through x_hat, variance and mean.
    exact, gradient = x.astype(np.float64), dy.astype(np.float64)
    pixels = x.size // channels
    exact_mean = channel_sum(exact) / pixels
    centred = exact - exact_mean
    inv = 1 / np.sqrt(channel_sum(centred**2) / pixels + 1e-5)
    d_x_hat = gradient * weight
    d_variance = channel_sum(d_x_hat * centred) * -0.5 * inv**3
    d_mean = -channel_sum(d_x_hat * inv) - d_variance * 2 * channel_sum(centred) / pixels
    expected = d_x_hat * inv + d_variance * 2 * centred / pixels + d_mean / pixels

    x_hat = centred * inv
    unit = 8 * np.finfo(dtype).eps * math.sqrt(pixels)
    sum_dy, sum_product = channel_sum(np.abs(gradient)), channel_sum(np.abs(gradient * x_hat))
    from_mean = np.abs(exact_mean) * inv  # rounding of the mean shifts all of x_hat
    assert_within(dbias, channel_sum(gradient), unit * sum_dy)
    assert_within(dweight, channel_sum(gradient * x_hat), unit * (sum_product + sum_dy * from_mean))
    spread = np.abs(gradient) + (sum_dy + (np.abs(x_hat) + from_mean) * sum_product) / pixels
    assert_within(dx, expected, unit * weight * inv * (1 + from_mean) * spread)


def test_batch_norm_of_infinity_is_nan_without_a_warning():
    x = np.ones((1, 2, 2, 2), np.float32)
    x[0, 0, 0, 0] = np.inf
    weight = bias = np.ones(2, np.float32)
    y, dx = unset((2, *x.shape), np.float32)
    mean, inv_std, variance, dweight, dbias = unset((5, 2), np.float32)
    batch_norm.training_forward(x, weight, bias, y, mean, inv_std, variance, 1e-5)
    batch_norm.backward(x, x, weight, mean, inv_std, dx, dweight, dbias)
    assert np.isnan(y[..., 0]).all()
    assert np.isnan(dx[..., 0]).all()
    assert_equal(y[..., 1], np.ones((1, 2, 2)))


# --- ReLU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("chunking")
def test_relu_of_every_kind_of_value(dtype):
    kinds = [np.nan, -np.inf, -1, -1e-40, -0.0, 0.0, 1e-40, 1, np.inf]
    x, dy = np.array(list(itertools.product(kinds, kinds)), dtype).T.copy()
    y, dx = unset((2, len(x)), dtype)
    activation.relu_forward(x, y)
    assert_equal(y, np.array([value if math.isnan(value) else max(float(value), 0.0) for value in x]))
    activation.relu_backward(x, dy, dx)
    assert_equal(dx, np.array([g if value > 0 else 0.0 for value, g in zip(x, dy, strict=True)]))
    activation.relu_backward(x, dy, dy)
    assert_same_bits(dy, dx)


# --- pooling -----------------------------------------------------------------------------------------------------


def reference_pool(x):
    """Values and codes of 2x2 windows, cut at odd edges, one window at a time."""
    images, height, width, channels = x.shape
    shape = (images, -(-height // 2), -(-width // 2), channels)
    y, codes = np.empty(shape, x.dtype), np.empty(shape, np.uint8)
    for n, i, j, c in np.ndindex(shape):
        places = [(2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)]
        inside = [(k, x[n, r, q, c]) for k, (r, q) in enumerate(places) if r < height and q < width]
        code, best = inside[0]
        for k, value in inside[1:]:
            if not math.isnan(best) and (value > best or math.isnan(value)):
                code, best = k, value
        y[n, i, j, c], codes[n, i, j, c] = best, code
    return y, codes


def places_of(codes):
    """Yields the index of each window, and that of its coded place in the map."""
    for n, i, j, c in np.ndindex(codes.shape):
        row, column = divmod(int(codes[n, i, j, c]), 2)
        yield (n, i, j, c), (n, 2 * i + row, 2 * j + column, c)


POOLED = [(1, 1, 1, 1), (2, 1, 5, 3), (1, 7, 1, 2), (2, 6, 4, 5), (3, 5, 7, 4), (1, 13, 11, 2)]


def map_with_ties(shape, dtype):
    """Few different values, so ties are frequent: both zeros, NaN, infinities, and a number whose last bit is set."""
    values = np.array([-np.inf, -1, -0.0, 0.0, 0.1, 1, np.inf, np.nan], dtype)
    return np.random.default_rng(6).choice(values, shape, p=[0.2, 0.2, 0.1, 0.1, 0.15, 0.1, 0.05, 0.1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", POOLED)
@pytest.mark.usefixtures("chunking")
def test_pooling_and_moves_by_code(shape, dtype):
    x = map_with_ties(shape, dtype)
    expected_y, expected_codes = reference_pool(x)
    y, codes = unset(expected_y.shape, dtype), unset(expected_y.shape, np.uint8)
    pooling.max_pool_forward(x, y, codes)
    assert_equal(y, expected_y)
    assert_equal(codes, expected_codes)

    moved = map_with_ties(y.shape, dtype)
    expected_map, expected_values = np.zeros(shape, dtype), np.zeros(y.shape, dtype)
    for window, place in places_of(codes):
        expected_map[place] = moved[window]
        expected_values[window] = x[place]
    scattered, gathered = unset(shape, dtype), unset(y.shape, dtype)
    pooling.scatter_windows(moved, codes, scattered)
    assert_same_bits(scattered, expected_map)
    pooling.gather_windows(x, codes, gathered)
    assert_same_bits(gathered, expected_values)


@pytest.mark.parametrize("size", [(2, 2), (1, 2), (2, 1)])
def test_pooling_of_every_combination_of_special_values(size):
    kinds = [np.nan, -np.inf, 0, 1, np.inf]
    windows = np.array(list(itertools.product(kinds, repeat=size[0] * size[1])), np.float32)
    x = np.ascontiguousarray(windows.T.reshape(1, *size, -1))
    y, codes = unset((1, 1, 1, len(windows)), np.float32), unset((1, 1, 1, len(windows)), np.uint8)
    pooling.max_pool_forward(x, y, codes)
    expected_y, expected_codes = reference_pool(x)
    assert_equal(y, expected_y)
    assert_equal(codes, expected_codes)


# --- cross-entropy -----------------------------------------------------------------------------------------------


def reference_cross_entropy(logits, labels, class_weights, smoothing, scale):
    """Sums and gradient, one pixel at a time."""
    sums, gradient = np.zeros(3), np.zeros(logits.shape)
    for p, label in enumerate(labels):
        if label == 255:
            continue
        weights = [1.0] * len(logits[p]) if class_weights is None else [float(weight) for weight in class_weights]
        shifted = [float(value) - float(logits[p].max()) for value in logits[p]]
        total = math.fsum(math.exp(value) for value in shifted)
        # The label's share, and that of every class.
        shares = [smoothing / len(weights) * weight for weight in weights]
        shares[label] += (1 - smoothing) * weights[label]
        sums[0] += math.fsum(share * (math.log(total) - value) for share, value in zip(shares, shifted, strict=True))
        sums[1:] += weights[label], 1
        for k, value in enumerate(shifted):
            gradient[p, k] = scale * (math.exp(value) / total * math.fsum(shares) - shares[k])
    return sums, gradient


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("pixels", "classes"), [(1, 1), (7, 2), (101, 21), (64, 16)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.usefixtures("chunking")
def test_cross_entropy(pixels, classes, weighted, smoothing, dtype):
    rng = np.random.default_rng(7)
    logits = (4 * rng.standard_normal((pixels, classes))).astype(dtype)
    labels = rng.integers(0, classes, pixels).astype(np.uint8)
    labels[1::5] = 255
    class_weights = rng.uniform(0.1, 3, classes).astype(dtype) if weighted else None
    sums, dlogits = unset(3, np.float64), unset(logits.shape, dtype)
    loss.cross_entropy_forward(logits, labels, class_weights, smoothing, sums)
    loss.cross_entropy_backward(logits, labels, class_weights, smoothing, 0.25, dlogits)
    expected_sums, expected = reference_cross_entropy(logits, labels, class_weights, smoothing, 0.25)
    eps = np.finfo(dtype).eps
    largest = 3 if weighted else 1
    spread = 2 * float(np.abs(logits).max()) + 4
    # Smoothing sums over the classes of each pixel.
    weights = expected_sums[1] + smoothing * math.sqrt(classes) * largest * expected_sums[2]
    assert_within(sums[:1], expected_sums[:1], 2 * eps * spread * weights)
    assert_within(sums[1:], expected_sums[1:], 1e-12 * expected_sums[1:])
    assert_within(dlogits, expected, 2 * eps * spread * 0.25 * largest)
    assert_equal(dlogits[labels == 255], np.zeros((np.count_nonzero(labels == 255), classes)))


def test_cross_entropy_of_extreme_logits():
    logits = np.array([[3e38, -3e38, 0], [-np.inf, 0, 0], [np.nan, np.inf, 0], [-200, -200, -200]], np.float32)
    labels = np.array([0, 1, 255, 2], np.uint8)
    sums, dlogits = unset(3, np.float64), unset(logits.shape, np.float32)
    loss.cross_entropy_forward(logits, labels, None, 0.0, sums)
    loss.cross_entropy_backward(logits, labels, None, 0.0, 1.0, dlogits)
    assert_within(sums, np.array([math.log(2) + math.log(3), 3, 3]), 1e-6)
    third = 1 / 3
    expected = np.array([[0, 0, 0], [0, -0.5, 0.5], [0, 0, 0], [third, third, third - 1]])
    assert_within(dlogits, expected, 1e-6)


def test_cross_entropy_of_void_only():
    logits, labels = np.ones((3, 2), np.float32), np.full(3, 255, np.uint8)
    sums, dlogits = unset(3, np.float64), unset((3, 2), np.float32)
    loss.cross_entropy_forward(logits, labels, None, 0.0, sums)
    loss.cross_entropy_backward(logits, labels, None, 0.0, 1.0, dlogits)
    assert_equal(sums, np.zeros(3))
    assert_equal(dlogits, np.zeros((3, 2)))


# --- workers -----------------------------------------------------------------------------------------------------


def one_of_everything():
    """The outputs of every function on arrays large enough for several chunks each."""
    rng = np.random.default_rng(8)
    outputs = []

    def output(shape, dtype=np.float32):
        outputs.append(unset(shape, dtype))
        return outputs[-1]

    for channels, filters, size in ((3, 8, 90), (40, 36, 44)):
        x, dy = (rng.standard_normal((2, size, size, c)).astype(np.float32) for c in (channels, filters))
        weight = rng.standard_normal((filters, 3, 3, channels)).astype(np.float32)
        bias = rng.standard_normal(filters).astype(np.float32)
        conv2d.forward(x, weight, bias, output(dy.shape), 1, 1)
        conv2d.backward_data(dy, weight, output(x.shape), 1, 1)
        conv2d.backward_weight(x, dy, output(weight.shape), 1, 1)
        conv2d.backward_bias(dy, output(filters))
    x, dy = rng.standard_normal((2, 2, 64, 64, 40)).astype(np.float32)
    weight, bias = per_channel(rng, 40, np.float32)
    mean, inv_std = output(40), output(40)
    batch_norm.training_forward(x, weight, bias, output(x.shape), mean, inv_std, output(40), 1e-5)
    batch_norm.evaluation_forward(x, weight, bias, mean, inv_std, output(x.shape), 1e-5)
    batch_norm.backward(x, dy, weight, mean, inv_std, output(x.shape), output(40), output(40))
    activation.relu_forward(x, output(x.shape))
    activation.relu_backward(x, dy, output(x.shape))
    codes = output((2, 32, 32, 40), np.uint8)
    pooled = output(codes.shape)
    pooling.max_pool_forward(x, pooled, codes)
    pooling.scatter_windows(pooled, codes, output(x.shape))
    pooling.gather_windows(dy, codes, output(codes.shape))
    logits, labels = x.reshape(-1, 20), rng.integers(0, 20, x.size // 20).astype(np.uint8)
    loss.cross_entropy_forward(logits, labels, weight[:20], 0.1, output(3, np.float64))
    loss.cross_entropy_backward(logits, labels, weight[:20], 0.1, 0.5, output(logits.shape))
    return outputs


def assert_all_same_bits(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.usefixtures("way")
def test_results_do_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(winograd, "_BYTES_TOGETHER", 1 << 20)
    monkeypatch.setenv("SEGNET_THREADS", "1")
    alone = one_of_everything()
    for array in alone:
        assert not np.isnan(array).any()
    for count in ("2", "3"):
        monkeypatch.setenv("SEGNET_THREADS", count)
        assert_all_same_bits(one_of_everything(), alone)


def test_calls_from_several_threads_do_not_disturb_each_other():
    alone = one_of_everything()
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: one_of_everything()})) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        assert_all_same_bits(results[k], alone)


def test_calls_from_several_threads_take_turns():
    begun = threading.Event()
    other = threading.Thread(target=workers.parallel_for, args=(1, lambda index: begun.set()))
    with workers.single_threaded_blas():
        other.start()
        assert not begun.wait(0.2)
    other.join(30)
    assert begun.is_set()


def send_one_of_everything(connection):
    connection.send(one_of_everything())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_during_an_operation_works():
    alone = one_of_everything()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=send_one_of_everything, args=(sender,))
    inside, may_leave = threading.Event(), threading.Event()

    def operation(index):
        inside.set()
        may_leave.wait(60)

    other = threading.Thread(target=workers.parallel_for, args=(1, operation))
    other.start()
    try:
        assert inside.wait(30)
        child.start()
        assert receiver.poll(30), "the child hangs"
        assert_all_same_bits(receiver.recv(), alone)
    finally:
        may_leave.set()
        other.join()
        child.kill()
        child.join()


def blas_threads():
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


def test_parallel_for_runs_each_index_once_with_one_blas_thread(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "3")
    before = blas_threads()
    seen, inside = [], []

    def body(index):
        seen.append(index)
        inside.append(blas_threads())

    workers.parallel_for(20, body)
    assert sorted(seen) == list(range(20))
    assert all(threads <= {1} for threads in inside)
    assert blas_threads() == before
    workers.parallel_for(0, body)
    assert len(seen) == 20


LATER = """
import sys
import threadpoolctl
from segnet_scratch.runtime import workers

def threads(index):
    found.append([i["num_threads"] for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"])

found = []
workers.parallel_for(1, threads)
assert "scipy.linalg" not in sys.modules
import scipy.linalg
workers.parallel_for(1, threads)
print(found)
"""


def test_a_blas_that_was_loaded_later_is_limited_too():
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", LATER]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    before, after = ast.literal_eval(finished.stdout)
    assert len(after) >= len(before) >= 1
    assert set(before + after) == {1}


def test_parallel_for_uses_several_threads(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "3")
    together = threading.Barrier(3, timeout=30)
    workers.parallel_for(3, lambda index: together.wait())


def test_every_thread_limits_blas_itself(monkeypatch):
    # Where BLAS uses OpenMP, a limit holds for the thread that sets it.
    limited = set()

    class Recorder:
        def limited(self):
            limited.add(threading.get_ident())
            return contextlib.nullcontext()

    monkeypatch.setattr(workers, "_blas", Recorder())
    monkeypatch.setenv("SEGNET_THREADS", "3")
    together = threading.Barrier(3, timeout=30)
    working = set()

    def body(index):
        together.wait()
        working.add(threading.get_ident())

    workers.parallel_for(3, body)
    assert len(working) == 3
    assert limited == working


def test_parallel_for_nests_inline(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "2")
    seen = []

    def body(index):
        thread = threading.get_ident()
        workers.parallel_for(3, lambda inner: seen.append((index, inner, threading.get_ident() == thread)))

    workers.parallel_for(4, body)
    assert sorted(seen) == [(index, inner, True) for index in range(4) for inner in range(3)]


def test_parallel_for_raises_the_first_exception_and_recovers(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "2")
    before = blas_threads()
    begun = []
    together = threading.Barrier(2, timeout=30)

    def body(index):
        begun.append(index)
        if index < 2:
            together.wait()  # by now both threads are at work
        if index == 3:
            raise ValueError("index 3")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="index 3"):
        workers.parallel_for(1000, body)
    assert len(begun) < 1000
    assert blas_threads() == before
    total = []
    workers.parallel_for(5, total.append)
    assert sorted(total) == list(range(5))


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5"])
def test_worker_count_refuses_nonsense(text, monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", text)
    with pytest.raises(ConfigError, match="SEGNET_THREADS"):
        workers.worker_count()


def test_worker_count_defaults_to_the_usable_cores(monkeypatch):
    monkeypatch.delenv("SEGNET_THREADS", raising=False)
    assert workers.worker_count() >= 1
