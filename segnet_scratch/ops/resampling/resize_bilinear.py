"""Bilinear resize, as evaluation and prediction do with logits, and the "bilinear" decoder with its maps.

Pixel centres are at half-integers and the border is repeated: PyTorch's interpolate(align_corners=False). With corners
aligned, the pixels of a map twice as large would not lie where those of its pooling windows lay.
"""

from dataclasses import dataclass

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, expect, expect_map
from segnet_scratch.ops.resampling import fast


@dataclass(frozen=True)
class Rows:
    """Rows of a resized map, `count` from `first` on; x holds those of the map of `x_height` rows from `x_first` on."""

    first: int
    count: int
    x_first: int
    x_height: int


def source_rows(first: int, count: int, height: int, x_height: int) -> tuple[int, int]:
    """The rows [low, high) of a map of `x_height` that so many rows of it, resized to `height`, are made of.

    One more on either side than by the formula: its rounding is not the same everywhere.
    """
    low, high, _ = _taps(x_height, height, np.dtype(np.float64))
    return max(0, int(low[first]) - 1), min(x_height, int(high[first + count - 1]) + 2)


class ResizeBilinearForward(Op):
    """y (n, oh, ow, c) from x (n, h, w, c): pixel centres at half-integers, the border repeated, no antialiasing.

    With `rows` y holds only these, bit for bit as the whole has them.
    """

    name = "resize_bilinear_forward"

    def __init__(self, x: Spec, size: tuple[int, int], rows: Rows | None = None) -> None:
        n, height, _, c = expect_map(self.name, "x", x)
        expect(min(size) > 0, f"resize_bilinear: size {size}; expected positive (height, width)")
        self.rows = rows = rows or Rows(0, size[0], 0, height)
        within = 0 <= rows.first <= size[0] - rows.count < size[0] and 0 <= rows.x_first <= rows.x_height - height
        expect(within, f"resize_bilinear: {rows} do not lie in x {x.shape} and size {size}")
        low, high = source_rows(rows.first, rows.count, size[0], rows.x_height)
        held = f"resize_bilinear: x holds {height} rows from {rows.x_first} on"
        expect(rows.x_first <= low and high <= rows.x_first + height, f"{held}; {rows} need {low} to {high}")
        self.size, self.oh = size, size[0]
        self.h, self.x_first, self.y_first = rows.x_height, rows.x_first, rows.first
        self.inputs = {"x": x}
        self.outputs = {"y": x.with_shape(n, rows.count, size[1], c)}
        self.flops = 6 * self.outputs["y"].size

    def gradient(self) -> tuple[Op, ...]:
        return (ResizeBilinearBackward.plan(self.outputs["y"], self.inputs["x"].shape[1:3]),)

    def reference(self, b: Buffers) -> None:
        (rows, below, v), (columns, right, u) = self._row_taps(b.x.dtype), _taps(b.x.shape[2], self.size[1], b.x.dtype)
        u, v = u[:, None], v[:, None, None]
        across = b.x[:, :, columns] + u * (b.x[:, :, right] - b.x[:, :, columns])
        b.y[...] = across[:, rows] + v * (across[:, below] - across[:, rows])

    def numpy(self, b: Buffers) -> None:
        columns = _taps(b.x.shape[2], self.size[1], b.x.dtype)
        fast.gather(b.x, _as_weights(*self._row_taps(b.x.dtype)), _as_weights(*columns), b.y)

    def _row_taps(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = slice(self.rows.first, self.rows.first + self.rows.count)
        low, high, fraction = (taps[part] for taps in _taps(self.rows.x_height, self.size[0], dtype))
        return low - self.rows.x_first, high - self.rows.x_first, fraction


class ResizeBilinearBackward(Op):
    """dx (n, h, w, c) from dy (n, oh, ow, c). `size` is the (h, w) of x."""

    name = "resize_bilinear_backward"

    def __init__(self, dy: Spec, size: tuple[int, int]) -> None:
        n, _, _, c = expect_map(self.name, "dy", dy)
        expect(min(size) > 0, f"resize_bilinear: size {size}; expected positive (height, width)")
        self.size = size
        self.inputs = {"dy": dy}
        self.outputs = {"dx": dy.with_shape(n, *size, c)}
        self.flops = 8 * dy.size  # an element goes to four others: a multiplication and an addition each

    def reference(self, b: Buffers) -> None:
        sizes = zip(self.size, b.dy.shape[1:3], strict=True)
        (rows, below, v), (columns, right, u) = (_taps(source, target, b.dy.dtype) for source, target in sizes)
        b.dx[...] = 0
        for oy, ox in np.ndindex(b.dy.shape[1:3]):
            for row, down in ((rows[oy], 1 - v[oy]), (below[oy], v[oy])):
                for column, across in ((columns[ox], 1 - u[ox]), (right[ox], u[ox])):
                    b.dx[:, row, column] += down * across * b.dy[:, oy, ox]

    def numpy(self, b: Buffers) -> None:
        sizes = zip(self.size, b.dy.shape[1:3], strict=True)
        rows, columns = (fast.transposed(_as_weights(*_taps(s, t, b.dy.dtype)), s) for s, t in sizes)
        fast.gather(b.dy, rows, columns, b.dx)


def _taps(source: int, target: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, weight of the second) source index for each target index."""
    scale = dtype.type(source) / dtype.type(target)
    half = dtype.type(0.5)
    position = np.maximum((np.arange(target, dtype=dtype) + half) * scale - half, 0)
    low = np.minimum(position.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), position - low.astype(dtype)


def _as_weights(low: np.ndarray, high: np.ndarray, fraction: np.ndarray) -> fast.Taps:
    """The same as indices and weights of two terms."""
    return np.stack([low, high]), np.stack([1 - fraction, fraction])
