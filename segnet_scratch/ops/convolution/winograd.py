"""3x3 convolutions of stride 1 with 2.25 times fewer multiplications: Winograd's F(2x2, 3x3).

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section 4.1.

Two neighbouring outputs of a 1-D convolution, y0 = x0 w0 + x1 w1 + x2 w2 and y1 = x1 w0 + x2 w1 + x3 w2, take
4 products instead of 6:

    m0 = (x0 - x2) w0                      m1 = (x1 + x2) (w0 + w1 + w2) / 2
    m2 = (x2 - x1) (w0 - w1 + w2) / 2      m3 = (x1 - x3) w2
    y0 = m0 + m1 + m2                      y1 = m1 - m2 - m3

that is y = A (W w * X x) with the matrices below, * element by element. Along both axes, a 2x2 tile of
outputs takes a 4x4 tile of inputs and 16 products ("terms") instead of 36:

    y = A ((W w W') * (X x X')) A'

A term is summed over input channels for every tile and output channel, so a convolution is 16 matrix products
of (tiles, C) with (C, O).

            [1  0 -1  0]         [ 1   0   0]         [1  1  1  0]
        X = [0  1  1  0]     W = [1/2 1/2 1/2]    A = [0  1 -1 -1]
            [0 -1  1  0]         [1/2 -1/2 1/2]
            [0  1  0 -1]         [ 0   0   1]

The scheme is linear in w, so the weight gradient is its transpose, W' ((A' dy A) * (X x X')) W, summed over
tiles. The data gradient is the convolution of dy with the flipped kernel.

The factors 1/2 are exact in binary, so integer values still give exact results. Else the rounding error is
about twice that of direct summation, and belongs to the tile: an output also carries errors from the largest
input of its 4x4 tile, and NaN or infinity anywhere in the tile reaches all four outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from segnet_scratch.runtime.workers import parallel_for, parallel_slices, scratch, single_threaded_blas

# A map with many tiles is cut into steps that each worker does on its own. So many tiles outlast the hand-over of
# Python's lock and repay reading the weights, and few enough to stay in a last-level cache (measured: 98 to 1792).
_TILES_ALONE = 448
# Workers share the work on a map with fewer tiles, step by step, and the work on weight gradients, which are sums
# over all tiles. A step has so many bytes of transformed tiles on either side of the products.
_BYTES_TOGETHER = 16 << 20
# Number of parts that shared work is cut into.
_SHARES = 8
# Products of a term (tiles x C x O) from which on this is the faster way on one core, for 64 channels as for 512
# (measured: half of it to twice of it; 128 channels break even at 512 tiles, a map of 32x32 in a batch of 2).
_LEAST_PRODUCTS = 1 << 23
# Filters whose transforms are in a cache at a time.
_FILTER_BLOCK = 16


def suits(kernel: tuple[int, int], stride: int, channels_in: int, y: tuple[int, ...]) -> bool:
    """Whether a convolution to a map y (N, H', W', O) can go this way and gains by it.

    Few channels do not repay the transforms of tiles, few tiles not those of weights, a small map not all the calls.
    """
    images, height, width, channels_out = y
    products = images * -(-height // 2) * -(-width // 2) * channels_in * channels_out
    can = kernel == (3, 3) and stride == 1
    return can and min(channels_in, channels_out) >= 32 and products >= _LEAST_PRODUCTS


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
    """Writes y (N, H', W', O): x (N, H, W, C) convolved with weight terms (16, C, O), plus any bias (O,)."""
    tiles = _Tiles.of(y)

    def run(rows: slice, shares: int) -> None:
        x_terms, y_terms = tiles.terms("x_terms", x, rows), tiles.terms("y_terms", y, rows)

        def transform(image: int, row: int, place: slice) -> None:
            _transform_x(x[image], 2 * row - padding, -padding, x_terms[:, :, place])

        def restore(image: int, row: int, place: slice) -> None:
            _restore_y(y_terms[:, :, place], bias, y[image, 2 * row :])

        tiles.for_pieces(rows, shares, transform)
        left, results = _products(x_terms), _products(y_terms)

        def multiply(part: slice) -> None:
            np.matmul(left[part], terms[part], out=results[part])

        parallel_slices(16, 16 // shares, multiply)
        tiles.for_pieces(rows, shares, restore)

    if tiles.count >= _SHARES * _TILES_ALONE // 2:
        # A multiple of _SHARES, because workers that get one step more than the rest keep them waiting.
        steps = tiles.steps(_SHARES * -(-tiles.count // (_SHARES * _TILES_ALONE)))
        parallel_for(len(steps), lambda index: run(steps[index], 1))
    else:
        with single_threaded_blas():
            for rows in tiles.steps_together(x, y):
                run(rows, _SHARES)


def backward_weight(x: np.ndarray, dy: np.ndarray, dweight: np.ndarray, padding: int) -> None:
    """Writes the gradient dweight (O, 3, 3, C) for x (N, H, W, C) and dy (N, H', W', O)."""
    tiles = _Tiles.of(dy)
    sums = scratch("weight_terms", (16, dy.shape[3], x.shape[3]), x.dtype)
    sums.fill(0)

    def run(rows: slice) -> None:
        x_terms, dy_terms = tiles.terms("x_terms", x, rows), tiles.terms("y_terms", dy, rows)

        def transform(image: int, row: int, place: slice) -> None:
            _transform_x(x[image], 2 * row - padding, -padding, x_terms[:, :, place])
            _transform_dy(dy[image], 2 * row, dy_terms[:, :, place])

        tiles.for_pieces(rows, _SHARES, transform)
        left, right = _products(dy_terms), _products(x_terms)

        def add(term: int) -> None:
            product = scratch("product", sums.shape[1:], sums.dtype)
            np.matmul(left[term].T, right[term], out=product)
            sums[term] += product

        parallel_for(16, add)

    with single_threaded_blas():
        for rows in tiles.steps_together(x, dy):
            run(rows)
    _restore_weight(sums, dweight)


def _products(terms: np.ndarray) -> np.ndarray:
    """Transformed tiles (4, 4, rows, columns, channels) seen as 16 matrices: (16, tiles, channels)."""
    return terms.reshape(16, -1, terms.shape[4])


@dataclass(frozen=True)
class _Tiles:
    """The 2x2 tiles that cover the output maps of a batch; rows of tiles are numbered through all images."""

    images: int
    rows: int  # per image
    columns: int

    @staticmethod
    def of(y: np.ndarray) -> "_Tiles":
        """Tiles of y (N, H', W', O)."""
        return _Tiles(len(y), -(-y.shape[1] // 2), -(-y.shape[2] // 2))

    @property
    def count(self) -> int:
        return self.images * self.rows * self.columns

    def steps(self, count: int) -> list[slice]:
        """Cuts the tile rows into `count` steps."""
        bounds = [self.images * self.rows * index // count for index in range(count + 1)]
        return [slice(first, last) for first, last in pairwise(bounds)]

    def steps_together(self, x: np.ndarray, y: np.ndarray) -> list[slice]:
        """Cuts the tile rows into steps with no more than _BYTES_TOGETHER on either side of the products."""
        total = self.images * self.rows
        row_bytes = 16 * self.columns * max(x.shape[3], y.shape[3]) * x.itemsize
        return self.steps(-(-total // max(1, _BYTES_TOGETHER // row_bytes)))

    def terms(self, name: str, like: np.ndarray, rows: slice) -> np.ndarray:
        """Scratch memory for the transformed tiles of some tile rows: (4, 4, rows, columns, channels)."""
        return scratch(name, (4, 4, rows.stop - rows.start, self.columns, like.shape[3]), like.dtype)

    def for_pieces(self, rows: slice, shares: int, body: Callable[[int, int, slice], None]) -> None:
        """Shares tile rows between workers, in about `shares` pieces that lie in one image each.

        Calls `body(image, first tile row of the piece in that image, place of the piece among the tile rows)`.
        """
        longest = -(-(rows.stop - rows.start) // shares)
        pieces = []
        first = rows.start
        while first < rows.stop:
            image, row = divmod(first, self.rows)
            last = min(first + longest, rows.stop, (image + 1) * self.rows)
            pieces.append((image, row, slice(first - rows.start, last - rows.start)))
            first = last
        parallel_for(len(pieces), lambda index: body(*pieces[index]))


def _transform_x(x: np.ndarray, top: int, left: int, terms: np.ndarray) -> None:
    """Writes X x X' of 4x4 tiles of an image (H, W, C), the first at (top, left).

    terms is (4, 4, tile rows, columns, C).
    """
    rows, columns, channels = terms.shape[2:]
    phases = scratch("phases", (2, 2, rows + 1, columns + 1, channels), x.dtype)
    _copy_phases(x, top, left, phases)
    half = scratch("half_transformed", (4, 2, rows, columns + 1, channels), x.dtype)
    _input_pass(phases[:, :, :-1], phases[:, :, 1:], half)
    by_column = half.swapaxes(0, 1)
    _input_pass(by_column[..., :-1, :], by_column[..., 1:, :], terms.swapaxes(0, 1))


def _transform_dy(dy: np.ndarray, top: int, terms: np.ndarray) -> None:
    """Writes A' dy A of 2x2 tiles of an image (H', W', O) from row `top` on: terms (4, 4, rows, columns, O).

    The last row of A' is (0, -1); its minus is left to _weight_pass_transposed.
    """
    half = scratch("half_transformed", (4, 2, *terms.shape[2:]), dy.dtype)
    _copy_phases(dy, top, 0, half[::3])
    np.add(half[0], half[3], out=half[1])
    np.subtract(half[0], half[3], out=half[2])
    np.copyto(terms[:, ::3], half)
    np.add(half[:, 0], half[:, 1], out=terms[:, 1])
    np.subtract(half[:, 0], half[:, 1], out=terms[:, 2])


def _restore_y(terms: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
    """Writes A m A', plus bias, of terms m (4, 4, rows, columns, O) to y (H', W', O) from its top row on.

    Tiles are cut at the lower and right edge of y.
    """
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

    phases[a, b, i, j] = source[top + 2 i + a, left + 2 j + b], and 0 outside. This lets every later pass run
    over long contiguous stretches.
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


def _input_pass(first: np.ndarray, second: np.ndarray, out: np.ndarray) -> None:
    """out (4, ...) = X x along one axis of tiles, where first (2, ...) is x0 and x1, and second is x2 and x3."""
    np.subtract(first, second, out=out[::3])
    np.add(first[1], second[0], out=out[1])
    np.subtract(second[0], first[1], out=out[2])


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
    """out (3, ...) = W' p along the first axis of p (4, ...), where p[3] still lacks its minus."""
    np.add(p[1], p[2], out=out[0])
    out[0] *= 0.5
    np.subtract(p[1], p[2], out=out[1])
    out[1] *= 0.5
    np.subtract(out[0], p[3], out=out[2])
    out[0] += p[0]
