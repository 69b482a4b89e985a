"""2x2 max-pooling of stride 2 with a code per window, and the moves between maps and windows by code.

A map (N, H, W, C) has windows (N, H', W', C), H' = ceil(H / 2), W' = ceil(W / 2); at an odd edge a window is
cut. A code (uint8) is a position in a window, 2*row + column, and never lies outside the map.

A chunk of window rows is first copied apart by position, so that every later pass is one long run. Values are
selected by bit masks: unlike factors 0 and 1 these keep NaN and infinity in their place, and they do not
branch.

All arrays are C-contiguous, maps and windows of one float type, and outputs do not overlap inputs; the files
in `ops/` check shapes.
"""

from collections.abc import Callable

import numpy as np

from segnet_scratch.runtime.workers import CHUNK_VALUES, parallel_for, scratch


def max_pool_forward(x: np.ndarray, y: np.ndarray, codes: np.ndarray) -> None:
    """Writes the largest value of each window of x (N, H, W, C) and its code: y and codes (N, H', W', C).

    Of equal values the first in row-major order wins; NaN wins over numbers, the first NaN over later ones.
    """

    def body(image: int, rows: slice) -> None:
        positions = scratch("positions", (4, *y[image, rows].shape), x.dtype)
        # The missing part of a cut window never wins: position 0 exists, comes first and is no less.
        _split(x[image, 2 * rows.start : 2 * rows.stop], positions, -np.inf)
        largest, code = y[image, rows], codes[image, rows]
        np.maximum(positions[0], positions[1], out=largest)
        np.maximum(largest, positions[2], out=largest)
        np.maximum(largest, positions[3], out=largest)
        # The code is the number of leading positions that are neither NaN nor the largest value.
        unequal, number, leading = scratch("flags", (3, *largest.shape), np.bool_)
        leading.fill(True)
        code.fill(0)
        for position in positions[:3]:
            np.not_equal(position, largest, out=unequal)
            np.equal(position, position, out=number)
            leading &= unequal
            leading &= number
            code += leading

    _for_window_rows(y, body)


def scatter_windows(values: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Writes values (N, H', W', C) to their coded places in out (N, H, W, C) and 0 everywhere else.

    This is the gradient of max-pooling, and the forward pass of unpooling.
    """

    def body(image: int, rows: slice) -> None:
        lower, right = _code_masks(codes[image, rows], values.dtype)
        bits = values[image, rows].view(lower.dtype)
        positions = scratch("positions", (4, *bits.shape), lower.dtype)
        np.bitwise_and(bits, lower, out=positions[2])
        np.bitwise_xor(bits, positions[2], out=positions[0])
        for left in (0, 2):
            np.bitwise_and(positions[left], right, out=positions[left + 1])
            np.bitwise_xor(positions[left], positions[left + 1], out=positions[left])
        _merge(positions.view(values.dtype), out[image, 2 * rows.start : 2 * rows.stop])

    _for_window_rows(values, body)


def gather_windows(source: np.ndarray, codes: np.ndarray, values: np.ndarray) -> None:
    """Reads values (N, H', W', C) from their coded places in source (N, H, W, C): unpooling's gradient."""

    def body(image: int, rows: slice) -> None:
        positions = scratch("positions", (4, *values[image, rows].shape), source.dtype)
        _split(source[image, 2 * rows.start : 2 * rows.stop], positions, 0)
        lower, right = _code_masks(codes[image, rows], source.dtype)
        bits = positions.view(lower.dtype)
        for left in (0, 2):
            _select(bits[left], bits[left + 1], right, bits[left])
        _select(bits[0], bits[2], lower, values[image, rows].view(lower.dtype))

    _for_window_rows(values, body)


def _for_window_rows(windows: np.ndarray, body: Callable[[int, slice], None]) -> None:
    """Calls `body(image, window rows)` for chunks of windows (N, H', W', C), on all workers."""
    images, height, width, channels = windows.shape
    step = max(1, CHUNK_VALUES // (2 * width * channels))
    chunks = -(-height // step)

    def run(index: int) -> None:
        image, chunk = divmod(index, chunks)
        body(image, slice(chunk * step, min((chunk + 1) * step, height)))

    parallel_for(images * chunks, run)


def _split(rows: np.ndarray, positions: np.ndarray, missing: float) -> None:
    """Copies map rows (H, W, C) apart by their position in the window: positions (4, H', W', C)."""
    for index, position in enumerate(positions):
        part = rows[index // 2 :: 2, index % 2 :: 2]
        position[: part.shape[0], : part.shape[1]] = part
        position[part.shape[0] :] = missing
        position[:, part.shape[1] :] = missing


def _merge(positions: np.ndarray, rows: np.ndarray) -> None:
    """Copies positions (4, H', W', C) together into map rows (H, W, C); what lies outside is dropped."""
    for index, position in enumerate(positions):
        part = rows[index // 2 :: 2, index % 2 :: 2]
        part[...] = position[: part.shape[0], : part.shape[1]]


def _code_masks(codes: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Two masks as wide as dtype: all bits set where the code is in the lower row, or in the right column."""
    integer = np.dtype(f"i{dtype.itemsize}")
    lower, right = scratch("masks", (2, *codes.shape), integer)
    np.copyto(lower, codes)
    np.bitwise_and(lower, 1, out=right)
    np.negative(right, out=right)
    np.right_shift(lower, 1, out=lower)
    np.negative(lower, out=lower)
    return lower, right


def _select(first: np.ndarray, second: np.ndarray, mask: np.ndarray, out: np.ndarray) -> None:
    """Bit for bit, out = second where the mask is set, else first; out may be first."""
    difference = scratch("difference", mask.shape, mask.dtype)
    np.bitwise_xor(first, second, out=difference)
    np.bitwise_and(difference, mask, out=difference)
    np.bitwise_xor(first, difference, out=out)
