"""ReLU and its gradient, on arrays of any shape.

All arrays of a call are C-contiguous and of one shape and float type; `ops/elementwise/relu.py` checks that. An output
may be the same array as an input.
"""

import numpy as np

from segnet_scratch.runtime.workers import CHUNK_VALUES, parallel_slices, scratch


def relu_forward(x: np.ndarray, y: np.ndarray) -> None:
    """Writes y = max(x, 0); NaN stays NaN."""
    x_flat, y_flat = x.reshape(-1), y.reshape(-1)
    # Against an array of zeros np.maximum runs several times faster than against the number 0.
    zeros = np.zeros(min(CHUNK_VALUES, x.size), x.dtype)

    def body(part: slice) -> None:
        np.maximum(x_flat[part], zeros[: part.stop - part.start], out=y_flat[part])

    parallel_slices(x.size, CHUNK_VALUES, body)


def relu_backward(y: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> None:
    """Writes dx = dy where y > 0, else 0 (also where y is NaN)."""
    integer = np.dtype(f"i{dy.itemsize}")
    y_flat, dy_bits, dx_bits = y.reshape(-1), dy.reshape(-1).view(integer), dx.reshape(-1).view(integer)

    def body(part: slice) -> None:
        positive = scratch("positive", (part.stop - part.start,), np.bool_)
        mask = scratch("mask", positive.shape, integer)
        np.greater(y_flat[part], 0, out=positive)
        # A mask has all bits set or none: unlike a factor 0 it drops NaN and infinity, and nothing branches.
        np.copyto(mask, positive)
        np.negative(mask, out=mask)
        np.bitwise_and(dy_bits[part], mask, out=dx_bits[part])

    parallel_slices(y.size, CHUNK_VALUES, body)
