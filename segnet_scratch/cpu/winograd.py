"""3x3 convolutions of stride 1 with 2.25 times fewer multiplications: Winograd's F(2x2, 3x3).

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.1.

Two neighbouring outputs of a 1-D convolution, y0 = x0 w0 + x1 w1 + x2 w2 and y1 = x1 w0 + x2 w1 + x3 w2, take 4
products instead of 6:

    m0 = (x0 - x2) w0                      m1 = (x1 + x2) (w0 + w1 + w2) / 2
    m2 = (x2 - x1) (w0 - w1 + w2) / 2      m3 = (x1 - x3) w2
    y0 = m0 + m1 + m2                      y1 = m1 - m2 - m3

that is y = A (W w * X x) with the three matrices below, one row per product. Used along both axes, a 2x2 tile of
outputs takes a 4x4 tile of inputs and 16 products instead of 36. Each of the 16 ("terms" here) is a product summed
over input channels for every tile, so a convolution is 16 matrix products of (tiles, C) with (C, O).

            [1  0 -1  0]         [ 1   0   0]         [1  1  1  0]
        X = [0  1  1  0]     W = [1/2 1/2 1/2]    A = [0  1 -1 -1]
            [0 -1  1  0]         [1/2 -1/2 1/2]
            [0  1  0 -1]         [ 0   0   1]

The scheme is bilinear, so the gradients use the same three matrices. With W' and A' transposed, the weight gradient is
W' (A' dy * X x), summed over tiles. The data gradient is the convolution of dy with flipped, transposed weights.

The factors 1/2 are exact in binary, so integer-valued arrays still give exact results. Otherwise an output carries the
rounding error of its whole tile: about twice that of direct summation, and NaN or infinity reaches a tile's other
three outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from segnet_scratch.cpu.workers import parallel_for, scratch, single_threaded_blas

# Tiles whose products a worker computes at a time: enough that a NumPy call outlasts the hand-over of Python's lock
# and that reading the weights pays, few enough to stay in the last-level cache.
_CHUNK_TILES = 448
_WGRAD_TILES = 2048
_FILTER_BLOCK = 16


def suits(kernel: tuple[int, int], stride: int, channels_in: int, channels_out: int) -> bool:
    """Whether a convolution can go this way and gains by it: few channels do not pay for the transforms."""
    return kernel == (3, 3) and stride == 1 and min(channels_in, channels_out) >= 32


def transform_weight(weight: np.ndarray, terms: np.ndarray) -> None:
    """Writes W w W' of every filter: weight (O, 3, 3, C) -> terms (16, O, C)."""
    terms = terms.reshape(4, 4, *terms.shape[1:])

    def body(block: int) -> None:
        part = slice(block * _FILTER_BLOCK, (block + 1) * _FILTER_BLOCK)
        filters = weight[part].transpose(1, 2, 0, 3)
        half = scratch("half_filters", (4, *filters.shape[1:]), weight.dtype)
        _weight_pass(filters, half)
        _weight_pass(half.swapaxes(0, 1), terms[:, :, part].swapaxes(0, 1))

    parallel_for(-(-len(weight) // _FILTER_BLOCK), body)


def convolve(x: np.ndarray, terms: np.ndarray, bias: np.ndarray | None, y: np.ndarray, padding: int) -> None:
    """Convolves x (N, H, W, C) with transformed weights (16, C, O), adds bias (O,) and writes y (N, H', W', O)."""
    tiles = _Tiles.of(y)
    chunks = 4 * -(-tiles.total_rows * tiles.columns // (4 * _CHUNK_TILES))

    def body(chunk: int) -> None:
        first, last = tiles.total_rows * chunk // chunks, tiles.total_rows * (chunk + 1) // chunks
        size = (last - first, tiles.columns)
        x_terms = scratch("x_terms", (4, 4, *size, x.shape[3]), x.dtype)
        y_terms = scratch("y_terms", (4, 4, *size, y.shape[3]), x.dtype)
        for image, row, part in tiles.pieces(first, last):
            _transform_x(x, image, 2 * row - padding, -padding, x_terms[:, :, part])
        np.matmul(x_terms.reshape(16, -1, x.shape[3]), terms, out=y_terms.reshape(16, -1, y.shape[3]))
        for image, row, part in tiles.pieces(first, last):
            _restore_y(y_terms[:, :, part], bias, y[image, 2 * row :])

    parallel_for(chunks, body)


def backward_weight(x: np.ndarray, dy: np.ndarray, dweight: np.ndarray, padding: int) -> None:
    """Writes the gradient dweight (O, 3, 3, C) for x (N, H, W, C) and dy (N, H', W', O)."""
    tiles = _Tiles.of(dy)
    out_channels, channels = dy.shape[3], x.shape[3]
    step = max(1, _WGRAD_TILES // tiles.columns)
    group = max(1, step // 8)
    x_terms = scratch("x_terms", (4, 4, step, tiles.columns, channels), x.dtype)
    dy_terms = scratch("dy_terms", (4, 4, step, tiles.columns, out_channels), x.dtype)
    sums = scratch("weight_terms", (16, out_channels, channels), x.dtype)
    sums.fill(0)

    def transform(first: int, last: int) -> None:
        for image, row, part in tiles.pieces(first, last):
            part = slice(part.start + first % step, part.stop + first % step)
            _transform_x(x, image, 2 * row - padding, -padding, x_terms[:, :, part])
            _transform_dy(dy, image, 2 * row, dy_terms[:, :, part])

    # Every term has its own sum, added to by one worker at a time in the order of the steps: no partial sums.
    with single_threaded_blas():
        for start in range(0, tiles.total_rows, step):
            stop = min(start + step, tiles.total_rows)
            rows = stop - start

            def transform_group(index: int) -> None:
                first = start + index * group
                transform(first, min(first + group, stop))

            def add_products(term: int) -> None:
                left = dy_terms[term // 4, term % 4, :rows].reshape(-1, out_channels)
                right = x_terms[term // 4, term % 4, :rows].reshape(-1, channels)
                product = scratch("product", (out_channels, channels), x.dtype)
                np.matmul(left.T, right, out=product)
                sums[term] += product

            parallel_for(-(-rows // group), transform_group)
            parallel_for(16, add_products)
    _restore_weight(sums, dweight)


@dataclass(frozen=True)
class _Tiles:
    """The 2x2 tiles that cover the output maps of a batch; tile rows are numbered through all images."""

    rows: int
    columns: int
    total_rows: int

    @classmethod
    def of(cls, y: np.ndarray) -> "_Tiles":
        rows = -(-y.shape[1] // 2)
        return cls(rows, -(-y.shape[2] // 2), len(y) * rows)

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, slice]]:
        """Cuts tile rows first..last-1 at image borders: image, tile row in it, and place of the piece in first..last-1."""
        at = first
        while at < last:
            image, row = divmod(at, self.rows)
            count = min(last - at, self.rows - row)
            yield image, row, slice(at - first, at - first + count)
            at += count


def _transform_x(x: np.ndarray, image: int, top: int, left: int, terms: np.ndarray) -> None:
    """Writes X x X' of the 4x4 tiles of one image, the first one at (top, left): terms (4, 4, rows, columns, C)."""
    rows, columns, channels = terms.shape[2:]
    phases = scratch("phases", (2, 2, rows + 1, columns + 1, channels), x.dtype)
    _copy_phases(x[image], top, left, phases)
    half = scratch("half_transformed", (4, 2, rows, columns + 1, channels), x.dtype)
    _input_pass(phases[0, :, :-1], phases[1, :, :-1], phases[0, :, 1:], phases[1, :, 1:], half)
    even, odd = half[:, 0], half[:, 1]
    _input_pass(even[:, :, :-1], odd[:, :, :-1], even[:, :, 1:], odd[:, :, 1:], terms.swapaxes(0, 1))


def _transform_dy(dy: np.ndarray, image: int, top: int, terms: np.ndarray) -> None:
    """Writes A' dy A of the 2x2 tiles of one image from row `top` on: terms (4, 4, rows, columns, O)."""
    half = scratch("half_transformed", (4, 2, *terms.shape[2:]), dy.dtype)
    _copy_phases(dy[image], top, 0, half[::3])
    np.add(half[0], half[3], out=half[1])
    np.subtract(half[0], half[3], out=half[2])
    np.copyto(terms[:, 0], half[:, 0])
    np.add(half[:, 0], half[:, 1], out=terms[:, 1])
    np.subtract(half[:, 0], half[:, 1], out=terms[:, 2])
    np.copyto(terms[:, 3], half[:, 1])


def _restore_y(terms: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
    """Writes A m A' of tiles (4, 4, rows, columns, O) to the top rows of y (H, W, O), plus bias; cuts at its edges."""
    half = scratch("half_restored", (2, *terms.shape[1:]), terms.dtype)
    np.add(terms[0], terms[1], out=half[0])
    half[0] += terms[2]
    np.subtract(terms[1], terms[2], out=half[1])
    half[1] -= terms[3]
    if bias is not None:
        # Each output takes the term of column 1 once, with a plus sign.
        half[:, 1] += bias
    half[:, 0] += half[:, 1]
    half[:, 1] -= half[:, 2]
    for row in range(2):
        for column, combine in enumerate((np.add, np.subtract)):
            target = y[row : 2 * terms.shape[2] : 2, column::2]
            place = (slice(target.shape[0]), slice(target.shape[1]))
            combine(half[row, column][place], half[row, column + 2][place], out=target)


def _restore_weight(terms: np.ndarray, dweight: np.ndarray) -> None:
    """Writes W' p W of every sum of products: terms (16, O, C) -> dweight (O, 3, 3, C)."""
    terms = terms.reshape(4, 4, *terms.shape[1:])

    def body(block: int) -> None:
        part = slice(block * _FILTER_BLOCK, (block + 1) * _FILTER_BLOCK)
        products = terms[:, :, part]
        half = scratch("half_filters", (3, *products.shape[1:]), terms.dtype)
        _weight_pass_transposed(products, half)
        _weight_pass_transposed(half.swapaxes(0, 1), dweight[part].transpose(2, 1, 0, 3))

    parallel_for(-(-len(dweight) // _FILTER_BLOCK), body)


def _copy_phases(source: np.ndarray, top: int, left: int, phases: np.ndarray) -> None:
    """Splits an image (H, W, C) by the parity of rows and columns: phases (2, 2, rows, columns, C).

    phases[a, b, i, j] = source[top + 2 i + a, left + 2 j + b], 0 outside. It makes every later pass run over long
    contiguous stretches.
    """
    for a in range(2):
        i0, i1 = _inside(top + a, phases.shape[2], source.shape[0])
        for b in range(2):
            j0, j1 = _inside(left + b, phases.shape[3], source.shape[1])
            phase = phases[a, b]
            for outside in (phase[:i0], phase[i1:], phase[i0:i1, :j0], phase[i0:i1, j1:]):
                if outside.size:
                    outside.fill(0)
            row, column = top + a + 2 * i0, left + b + 2 * j0
            phase[i0:i1, j0:j1] = source[row : row + 2 * (i1 - i0) : 2, column : column + 2 * (j1 - j0) : 2]


def _inside(start: int, count: int, size: int) -> tuple[int, int]:
    """The range of i within 0..count for which start + 2 i lies in 0..size-1."""
    low = min(count, max(0, -(start // 2)))
    return low, max(low, min(count, (size - start + 1) // 2))


def _input_pass(x0: np.ndarray, x1: np.ndarray, x2: np.ndarray, x3: np.ndarray, out: np.ndarray) -> None:
    """out (4, ...) = X x along one axis."""
    np.subtract(x0, x2, out=out[0])
    np.add(x1, x2, out=out[1])
    np.subtract(x2, x1, out=out[2])
    np.subtract(x1, x3, out=out[3])


def _weight_pass(w: np.ndarray, out: np.ndarray) -> None:
    """out (4, ...) = W w along the first axis of w (3, ...)."""
    middle = w[1] * 0.5
    out[0] = w[0]
    out[3] = w[2]
    np.add(w[0], w[2], out=out[1])
    out[1] *= 0.5
    np.subtract(out[1], middle, out=out[2])
    out[1] += middle


def _weight_pass_transposed(p: np.ndarray, out: np.ndarray) -> None:
    """out (3, ...) = W' p along the first axis of p (4, ...), where p[3] has the sign that _transform_dy left off."""
    np.add(p[1], p[2], out=out[0])
    out[0] *= 0.5
    np.subtract(p[1], p[2], out=out[1])
    out[1] *= 0.5
    np.subtract(out[0], p[3], out=out[2])
    out[0] += p[0]
