"""2-D convolution and its gradients on NHWC activations and OHWI weights.

There are two ways. `winograd` takes 3x3 kernels of stride 1 where there is much to multiply. For the rest, here, the
patches under the kernel are copied side by side into a matrix (im2col), a chunk of output rows at a time, and
each chunk is one matrix product. In NHWC a row of the kernel covers kw*C contiguous values, so patches copy
in long runs.

All arrays are C-contiguous and of one float type, and outputs do not overlap inputs; `ops/convolution/conv2d.py` checks
shapes. Throughout, H' = (H + 2*padding - kh) // stride + 1, and W' likewise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from segnet_scratch.ops.convolution import winograd
from segnet_scratch.runtime.workers import parallel_for, parallel_slices, scratch

# Bytes of patches copied at a time: they stay in a cache until the product has read them.
_PATCH_BYTES = 2 << 20
# The weight gradient is gathered in this many sums, whatever the number of workers.
_PARTIAL_SUMS = 16
_BIAS_PIXELS = 4096


def forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, y: np.ndarray, stride: int, padding: int
) -> None:
    """Writes y (N, H', W', O): x (N, H, W, C) convolved with weight (O, kh, kw, C), plus any bias (O,)."""
    kernel = weight.shape[1:3]
    if winograd.suits(kernel, stride, x.shape[3], y.shape):
        terms = scratch("weight_terms", (16, len(weight), x.shape[3]), x.dtype)
        winograd.transform_weight(weight, terms)
        winograd.convolve(x, terms.transpose(0, 2, 1), bias, y, padding)
    else:
        patches = _Patches(x, kernel, y.shape[:3], stride, (-padding, -padding))
        _convolve(patches, np.ascontiguousarray(weight.reshape(len(weight), -1).T), bias, y)


def backward_data(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, stride: int, padding: int) -> None:
    """Writes the gradient dx (N, H, W, C) for dy (N, H', W', O) and weight (O, kh, kw, C).

    dx is dy, spread out with stride-1 zeros between its pixels, convolved with the flipped kernel at stride
    1.
    """
    kernel = weight.shape[1:3]
    flipped = weight[:, ::-1, ::-1]
    if winograd.suits(kernel, stride, dy.shape[3], dx.shape):
        terms = scratch("weight_terms", (16, len(weight), dx.shape[3]), dy.dtype)
        winograd.transform_weight(flipped, terms)
        winograd.convolve(dy, terms, None, dx, 2 - padding)
    else:
        origin = (padding - kernel[0] + 1, padding - kernel[1] + 1)
        patches = _Patches(dy, kernel, dx.shape[:3], 1, origin, spread=stride)
        _convolve(patches, flipped.transpose(1, 2, 0, 3).reshape(-1, dx.shape[3]), None, dx)


def backward_weight(x: np.ndarray, dy: np.ndarray, dweight: np.ndarray, stride: int, padding: int) -> None:
    """Writes the gradient dweight (O, kh, kw, C) for x (N, H, W, C) and dy (N, H', W', O)."""
    kernel = dweight.shape[1:3]
    if winograd.suits(kernel, stride, x.shape[3], dy.shape):
        winograd.backward_weight(x, dy, dweight, padding)
        return
    patches = _Patches(x, kernel, dy.shape[:3], stride, (-padding, -padding))
    dy_rows = dy.reshape(-1, *dy.shape[2:])
    count = min(_PARTIAL_SUMS, patches.chunks)
    sums = scratch("weight_sums", (count, dy.shape[3], patches.values), x.dtype)

    def body(index: int) -> None:
        first, last = (patches.chunks * i // count for i in (index, index + 1))
        for chunk in range(first, last):
            rows = patches.rows_of(chunk)
            left, right = dy_rows[rows].reshape(-1, dy.shape[3]).T, patches.copy(rows)
            if chunk == first:
                np.matmul(left, right, out=sums[index])
            else:
                sums[index] += left @ right

    parallel_for(count, body)
    np.sum(sums, axis=0, out=dweight.reshape(dy.shape[3], -1))


def backward_bias(dy: np.ndarray, dbias: np.ndarray) -> None:
    """Writes the gradient dbias (O,): the sum of dy (N, H', W', O) over images and pixels."""
    pixels = dy.reshape(-1, dy.shape[3])
    sums = np.empty((-(-len(pixels) // _BIAS_PIXELS), dy.shape[3]), np.float64)
    ones = np.ones(_BIAS_PIXELS, dy.dtype)

    def body(part: slice) -> None:
        # A product with ones is several times faster than a sum over the first axis of few channels.
        sums[part.start // _BIAS_PIXELS] = ones[: part.stop - part.start] @ pixels[part]

    parallel_slices(len(pixels), _BIAS_PIXELS, body)
    dbias[...] = sums.sum(axis=0)


def _convolve(patches: "_Patches", matrix: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
    """Writes y (N, H', W', O) = patches times matrix (kh*kw*C, O), plus any bias (O,)."""
    y_rows = y.reshape(-1, *y.shape[2:])

    def body(chunk: int) -> None:
        rows = patches.rows_of(chunk)
        out = y_rows[rows].reshape(-1, y.shape[3])
        np.matmul(patches.copy(rows), matrix, out=out)
        if bias is not None:
            out += bias

    parallel_for(patches.chunks, body)


@dataclass(frozen=True)
class _Patches:
    """The patches of a source under a kernel, one per output pixel, cut into chunks of output rows.

    The source is spread out: its pixels lie `spread` apart, with zeros between and around them. The patch of
    output pixel (i, j) begins at origin + stride * (i, j). Output rows are numbered through all images.
    """

    source: np.ndarray  # (N, H, W, C)
    kernel: tuple[int, ...]  # (kh, kw)
    out_shape: tuple[int, ...]  # (N, H', W')
    stride: int
    origin: tuple[int, int]
    spread: int = 1

    @property
    def values(self) -> int:
        """Values in a patch."""
        return self.kernel[0] * self.kernel[1] * self.source.shape[3]

    @property
    def chunk_rows(self) -> int:
        """Output rows in a chunk."""
        row_bytes = self.out_shape[2] * self.values * self.source.itemsize
        return max(1, _PATCH_BYTES // row_bytes)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.out_shape[0] * self.out_shape[1] // self.chunk_rows)

    def rows_of(self, chunk: int) -> slice:
        """Output rows of a chunk."""
        first = chunk * self.chunk_rows
        return slice(first, min(first + self.chunk_rows, self.out_shape[0] * self.out_shape[1]))

    def copy(self, rows: slice) -> np.ndarray:
        """The patches of some output rows, (rows * W', kh*kw*C), in this thread's scratch memory."""
        _, height, width = self.out_shape
        row_shape = (width, self.kernel[0], self.kernel[1] * self.source.shape[3])
        patches = scratch("patches", (rows.stop - rows.start, *row_shape), self.source.dtype)
        first = rows.start
        while first < rows.stop:
            image, row = divmod(first, height)
            last = min(rows.stop, (image + 1) * height)
            field = self._field(image, row, last - first)
            down, right, item = field.strides
            strides = (self.stride * down, self.stride * right, down, item)
            patches[first - rows.start : last - rows.start] = as_strided(field, (last - first, *row_shape), strides)
            first = last
        return patches.reshape(-1, self.values)

    def _field(self, image: int, row: int, count: int) -> np.ndarray:
        """The part of the spread source that `count` output rows from `row` on see, with its zeros."""
        height = self.stride * (count - 1) + self.kernel[0]
        width = self.stride * (self.out_shape[2] - 1) + self.kernel[1]
        from_rows, to_rows = self._overlap(self.origin[0] + self.stride * row, height, self.source.shape[1])
        from_columns, to_columns = self._overlap(self.origin[1], width, self.source.shape[2])
        field = scratch("field", (height, width, self.source.shape[3]), self.source.dtype)
        field.fill(0)
        field[to_rows, to_columns] = self.source[image, from_rows, from_columns]
        return field

    def _overlap(self, start: int, length: int, size: int) -> tuple[slice, slice]:
        """Along an axis of `size` source pixels: those in start..start+length-1, and their places there."""
        low = max(0, -(-start // self.spread))
        high = max(low, min(size, -(-(start + length) // self.spread)))
        place = low * self.spread - start
        return slice(low, high), slice(place, place + self.spread * (high - low), self.spread)
