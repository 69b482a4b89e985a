"""Resizing as a weighted gather along both axes of an image, a chunk of output rows at a time, on all workers.

Forward and backward of a bilinear resize are both of this kind: an output row is a weighted sum of a few input rows,
and the gradient of an input row one of a few output rows. All arrays are C-contiguous maps (N, H, W, C) of one type.
"""

import numpy as np

from segnet_scratch.runtime.workers import CHUNK_VALUES, parallel_for, scratch

# Indices (terms, length) and weights (terms, length): position i of the result is the sum over the terms k of
# weights[k, i] * source[indices[k, i]].
Taps = tuple[np.ndarray, np.ndarray]


def transposed(taps: Taps, sources: int) -> Taps:
    """The taps of the gradient: for each of `sources` positions every result that it takes part in.

    Positions have unlike numbers of them; the shorter lists are filled up with weight 0 at the first one.
    """
    indices, weights = (a.T.reshape(-1) for a in taps)  # by result, so that sums run in ascending order of results
    order = np.argsort(indices, kind="stable")
    results, owners = order // len(taps[0]), indices[order]
    first = np.searchsorted(owners, np.arange(sources))
    count = np.bincount(owners, minlength=sources)
    rank = np.arange(len(owners)) - first[owners]
    gathered = np.tile(results[np.minimum(first, len(results) - 1)], (count.max(), 1))
    factors = np.zeros(gathered.shape, weights.dtype)
    gathered[rank, owners] = results
    factors[rank, owners] = weights[order]
    return gathered, factors


def gather(x: np.ndarray, rows: Taps, columns: Taps, out: np.ndarray) -> None:
    """Writes out (N, H', W', C): each pixel the weighted sum that `rows` and `columns` ask for."""
    (row_indices, row_weights), (column_indices, column_weights) = rows, columns
    images, height, width, channels = out.shape
    step = max(1, CHUNK_VALUES // (max(width, x.shape[2]) * channels))
    chunks = -(-height // step)

    def body(index: int) -> None:
        image, chunk = divmod(index, chunks)
        part = slice(chunk * step, min((chunk + 1) * step, height))
        across = scratch("rows", (part.stop - part.start, *x.shape[2:]), x.dtype)
        _sum(x[image], row_indices[:, part], row_weights[:, part, None, None], 0, across)
        _sum(across, column_indices, column_weights[:, :, None], 1, out[image, part])

    parallel_for(images * chunks, body)


def _sum(source: np.ndarray, indices: np.ndarray, weights: np.ndarray, axis: int, out: np.ndarray) -> None:
    """out = the sum over the terms of weights * source, taken along an axis."""
    term = scratch(f"term{axis}", out.shape, out.dtype)
    # mode="clip" spares a copy: indices are in range, and the default mode writes to a buffer first.
    np.take(source, indices[0], axis, out=out, mode="clip")
    out *= weights[0]
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        np.take(source, index, axis, out=term, mode="clip")
        term *= weight
        out += term
