"""2-D convolution and its gradients on NHWC activations and OHWI weights.

Two ways: `winograd` for 3x3 kernels of stride 1 with many channels, and for everything else (here) the patches under
the kernel copied side by side into a matrix (im2col), a chunk of output rows at a time, and one matrix product per
chunk. In NHWC a kernel row covers kw*C contiguous values, so patches are copied in long runs.

All arrays are C-contiguous and of one float type; `ops/conv2d.py` checks shapes. Throughout,
H' = (H + 2*padding - kh) // stride + 1, and W' likewise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from segnet_scratch.cpu import winograd
from segnet_scratch.cpu.workers import parallel_for, scratch

# Bytes of patches copied at a time: they stay in a cache until the product has read them.
_PATCH_BYTES = 2 << 20
# A gradient summed over pixels is gathered in this many fixed parts, whatever the number of workers.
_PARTS = 16
_BIAS_PIXELS = 4096


def forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, y: np.ndarray, stride: int, padding: int
) -> None:
    """Convolves x (N, H, W, C) with weight (O, kh, kw, C), adds bias (O,) unless None, and writes y (N, H', W', O)."""
    kernel = weight.shape[1:3]
    if winograd.suits(kernel, stride, x.shape[3], y.shape[3]):
        terms = scratch("weight_terms", (16, len(weight), x.shape[3]), x.dtype)
        winograd.transform_weight(weight, terms)
        winograd.convolve(x, terms.transpose(0, 2, 1), bias, y, padding)
    else:
        patches = _Patches(x, kernel, y.shape[:3], stride, 1, (-padding, -padding))
        _convolve(patches, np.ascontiguousarray(weight.reshape(len(weight), -1).T), bias, y)


def backward_data(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, stride: int, padding: int) -> None:
    """Writes the gradient dx (N, H, W, C) for dy (N, H', W', O) and weight (O, kh, kw, C).

    It is the stride-1 convolution with the flipped kernel of dy spread out: stride-1 zeros between its pixels.
    """
    kernel = weight.shape[1:3]
    flipped = weight[:, ::-1, ::-1]
    if winograd.suits(kernel, stride, dx.shape[3], dy.shape[3]):
        terms = scratch("weight_terms", (16, len(weight), dx.shape[3]), dy.dtype)
        winograd.transform_weight(flipped, terms)
        winograd.convolve(dy, terms, None, dx, 2 - padding)
    else:
        origin = (padding - kernel[0] + 1, padding - kernel[1] + 1)
        patches = _Patches(dy, kernel, dx.shape[:3], 1, stride, origin)
        _convolve(patches, flipped.transpose(1, 2, 0, 3).reshape(-1, dx.shape[3]), None, dx)


def backward_weight(x: np.ndarray, dy: np.ndarray, dweight: np.ndarray, stride: int, padding: int) -> None:
    """Writes the gradient dweight (O, kh, kw, C) for x (N, H, W, C) and dy (N, H', W', O)."""
    kernel = dweight.shape[1:3]
    if winograd.suits(kernel, stride, x.shape[3], dy.shape[3]):
        winograd.backward_weight(x, dy, dweight, padding)
        return
    patches = _Patches(x, kernel, dy.shape[:3], stride, 1, (-padding, -padding))
    dy_rows = dy.reshape(-1, dy.shape[2], dy.shape[3])
    parts = scratch("weight_parts", (_PARTS, dy.shape[3], patches.values), x.dtype)
    parts.fill(0)

    def body(part: int) -> None:
        for chunk in range(patches.chunks * part // _PARTS, patches.chunks * (part + 1) // _PARTS):
            rows = patches.rows_of(chunk)
            parts[part] += dy_rows[rows].reshape(-1, dy.shape[3]).T @ patches.copy(rows)

    parallel_for(_PARTS, body)
    np.sum(parts, axis=0, out=dweight.reshape(dy.shape[3], -1))


def backward_bias(dy: np.ndarray, dbias: np.ndarray) -> None:
    """Writes the gradient dbias (O,): the sum of dy (N, H', W', O) over images and pixels, gathered in float64."""
    pixels = dy.reshape(-1, dy.shape[3])
    chunks = -(-len(pixels) // _BIAS_PIXELS)
    sums = np.empty((chunks, dy.shape[3]), np.float64)
    ones = np.ones(_BIAS_PIXELS, dy.dtype)

    def body(chunk: int) -> None:
        part = pixels[chunk * _BIAS_PIXELS : (chunk + 1) * _BIAS_PIXELS]
        # A product with ones reads rows of few channels faster than a sum over the first axis does.
        sums[chunk] = ones[: len(part)] @ part

    parallel_for(chunks, body)
    dbias[...] = sums.sum(axis=0)


def _convolve(patches: "_Patches", matrix: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
    """Multiplies all patches by matrix (kh*kw*C, O), adds bias (O,) and writes y (N, H', W', O)."""
    y_rows = y.reshape(-1, y.shape[2], y.shape[3])

    def body(chunk: int) -> None:
        rows = patches.rows_of(chunk)
        out = y_rows[rows].reshape(-1, y.shape[3])
        np.matmul(patches.copy(rows), matrix, out=out)
        if bias is not None:
            out += bias

    parallel_for(patches.chunks, body)


@dataclass(frozen=True)
class _Patches:
    """The patches of a source (N, H, W, C) under a kernel, one per output pixel, cut into chunks of output rows.

    Output rows are numbered through all images. The source is spread out: its pixels lie `spread` apart with zeros
    between and around. The patch of output pixel (i, j) begins at origin + (stride * i, stride * j).
    """

    source: np.ndarray
    kernel: tuple[int, int]
    out_shape: tuple[int, int, int]  # (N, H', W')
    stride: int
    spread: int
    origin: tuple[int, int]

    @property
    def values(self) -> int:
        """Values per patch."""
        return self.kernel[0] * self.kernel[1] * self.source.shape[3]

    @property
    def chunk_rows(self) -> int:
        """Output rows per chunk."""
        row_bytes = self.out_shape[2] * self.values * self.source.itemsize
        return max(1, _PATCH_BYTES // row_bytes)

    @property
    def chunks(self) -> int:
        return -(-self.out_shape[0] * self.out_shape[1] // self.chunk_rows)

    def rows_of(self, chunk: int) -> slice:
        """Output rows of a chunk."""
        first = chunk * self.chunk_rows
        return slice(first, min(first + self.chunk_rows, self.out_shape[0] * self.out_shape[1]))

    def copy(self, rows: slice) -> np.ndarray:
        """Patches of some output rows, (rows * W', kh*kw*C), valid until this thread's next call."""
        height, width = self.out_shape[1:]
        kernel_row = self.kernel[1] * self.source.shape[3]
        patches = scratch("patches", (rows.stop - rows.start, width, self.kernel[0], kernel_row), self.source.dtype)
        at = rows.start
        while at < rows.stop:
            image, row = divmod(at, height)
            count = min(rows.stop - at, height - row)
            field = self._field(image, row, count)
            down, right, item = field.strides
            windows = as_strided(
                field,
                (count, width, self.kernel[0], kernel_row),
                (self.stride * down, self.stride * right, down, item),
            )
            np.copyto(patches[at - rows.start : at - rows.start + count], windows)
            at += count
        return patches.reshape(-1, self.values)

    def _field(self, image: int, row: int, count: int) -> np.ndarray:
        """The spread-out, zero-padded part of an image that `count` output rows from `row` on see."""
        height = self.stride * (count - 1) + self.kernel[0]
        width = self.stride * (self.out_shape[2] - 1) + self.kernel[1]
        field = scratch("field", (height, width, self.source.shape[3]), self.source.dtype)
        field.fill(0)
        from_rows, to_rows = self._overlap(self.origin[0] + self.stride * row, height, self.source.shape[1])
        from_columns, to_columns = self._overlap(self.origin[1], width, self.source.shape[2])
        field[to_rows, to_columns] = self.source[image, from_rows, from_columns]
        return field

    def _overlap(self, start: int, length: int, size: int) -> tuple[slice, slice]:
        """Along one axis, the source pixels that lie in start..start+length-1 of the spread source, and where."""
        low = max(0, -(-start // self.spread))
        high = max(low, min(size, -(-(start + length) // self.spread)))
        place = low * self.spread - start
        return slice(low, high), slice(place, place + self.spread * (high - low), self.spread)
