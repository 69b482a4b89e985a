"""What the kernels of the fused engine have in common: pieces of 16 bytes, tiles of 128 rows."""

import numpy as np

from segnet_scratch.ops.op import expect
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.precision import BFLOAT16

TILE_ROWS = 128  # of a convolution's matrix product, in every tile: what a row of `partials` sums up
PIECE_BYTES = 16


def piece_of(dtype: np.dtype) -> int:
    """Channels in a piece, a 16-byte vector that a thread loads or stores at once (cuda/common/piece.cuh)."""
    return max(4, PIECE_BYTES // np.dtype(dtype).itemsize)  # float64, which no kernel moves: as float32


def expect_pieces(op: str, dtype: np.dtype, **channels: int) -> None:
    """ShapeError unless the numbers of channels are whole pieces of this element type."""
    piece = piece_of(dtype)
    for what, count in channels.items():
        fix = f"use a width that makes it a multiple of {piece}, or the layers engine"
        expect(count % piece == 0, f"{op}: {count} {what}; the fused kernels move pieces of {piece} numbers: {fix}")


MAP_THREADS = 256
LOADS = 4  # rows whose pieces a thread loads at a time, where it goes from row to row


def map_grid(device: Device, map_: Array, each: int = 1, resident: int = 3) -> int:
    """Blocks of MAP_THREADS for a grid-stride loop over the pieces of a map (cuda/common/grid_stride.cuh).

    At most as many as a GPU holds at once, `resident` per multiprocessor; at least `each` pieces for a thread: LOADS,
    or 1 where it goes from window to window. What is computed does not depend on the grid.
    """
    pieces = map_.size // piece_of(map_.dtype)
    return min(-(-pieces // (each * MAP_THREADS)), resident * device.multiprocessors)


def tiles_of(rows: int) -> int:
    """How many tiles cover so many rows."""
    return -(-rows // TILE_ROWS)


def rounded(array: np.ndarray, storage: np.dtype) -> np.ndarray:
    """What is stored of an array, in the array's own type."""
    return array.astype(BFLOAT16).astype(array.dtype) if storage == BFLOAT16 else array
