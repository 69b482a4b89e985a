"""Pooling and its like by their definitions, element by element, for inputs on which a clever expression goes wrong.

The references of the ops are NumPy expressions over whole arrays. These are loops, so that NaN, ties and positions that
do not exist are plain to see.
"""

from collections.abc import Iterator

import numpy as np

SPECIAL = np.array([np.nan, -np.inf, np.inf, -1, 0, 1, 1])  # hostile values, with ties


def pool(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Max-pool of (n, h, w, c): values and codes. The first maximum wins; a NaN wins, the first NaN over others."""
    n, h, w, c = x.shape
    y = np.empty((n, -(-h // 2), -(-w // 2), c), x.dtype)
    codes = np.empty(y.shape, np.uint8)
    for index in np.ndindex(y.shape):
        image, row, column, channel = index
        best = None
        for code in range(4):
            i, j = 2 * row + code // 2, 2 * column + code % 2
            if i < h and j < w:
                value = x[image, i, j, channel]
                if best is None or value > best or (value != value and best == best):
                    best, y[index], codes[index] = value, value, code
    return y, codes


def packed(codes: np.ndarray) -> np.ndarray:
    """Codes (n, h, w, c), four to a byte: that of channel k is bits 2 (k % 4) and up of byte k // 4."""
    bytes_ = np.zeros((*codes.shape[:3], codes.shape[3] // 4), np.uint8)
    for *pixel, channel in np.ndindex(codes.shape):
        bytes_[(*pixel, channel // 4)] += int(codes[(*pixel, channel)]) * 4 ** (channel % 4)
    return bytes_


def named(codes: np.ndarray, size: tuple[int, int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The index of each code, and that of the element of the map that it names.

    A code that points outside means position 0 of its window.
    """
    for index in np.ndindex(codes.shape):
        image, row, column, channel = index
        code = int(codes[index])
        i, j = 2 * row + code // 2, 2 * column + code % 2
        inside = code <= 3 and i < size[0] and j < size[1]
        yield index, (image, *((i, j) if inside else (2 * row, 2 * column)), channel)


def scatter(values: np.ndarray, codes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Max-unpool, and the backward of max-pool: each value at the position of its code, 0 elsewhere."""
    y = np.zeros((len(values), *size, values.shape[3]), values.dtype)
    for index, element in named(codes, size):
        y[element] = values[index]
    return y


def gather(map_: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The backward of max-unpool: the element at the position of each code."""
    values = np.empty(codes.shape, map_.dtype)
    for index, element in named(codes, (map_.shape[1], map_.shape[2])):
        values[index] = map_[element]
    return values


def argmax(logits: np.ndarray) -> np.ndarray:
    """For each pixel of (pixels, classes) the first NaN, else the first largest."""
    labels = np.empty(len(logits), np.uint8)
    for pixel, z in enumerate(logits):
        nan = np.flatnonzero(np.isnan(z))
        labels[pixel] = nan[0] if len(nan) else np.flatnonzero(z == z.max())[0]
    return labels
