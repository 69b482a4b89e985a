"""What the kernels of the fused engine have in common: pieces of 16 bytes, tiles of 128 rows, bfloat16 in NumPy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, expect
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.precision import BFLOAT16

TILE_ROWS = 128  # of a convolution's matrix product, in every tile: what a row of `partials` sums up
PIECE_BYTES = 16


def piece_of(dtype: np.dtype) -> int:
    """Channels in a piece: what the fused kernels move at once. cuda/common/piece.cuh has it, too."""
    return max(4, PIECE_BYTES // np.dtype(dtype).itemsize)  # float64, which no kernel moves: as float32


def expect_pieces(op: str, dtype: np.dtype, **channels: int) -> None:
    """ShapeError unless the numbers of channels are whole pieces of this element type."""
    piece = piece_of(dtype)
    for what, count in channels.items():
        expect(
            count % piece == 0,
            f"{op}: {count} {what}; the fused kernels move pieces of {piece} numbers: use a width that makes it a "
            f"multiple of {piece}, or the layers engine",
        )


@dataclass(frozen=True)
class Share:
    """The launch of a kernel that goes through a map once (cuda/common/share.cuh), so many pieces in all.

    No more blocks than a GPU holds at once, `resident` on a multiprocessor, and none with less than `each` pieces for a
    thread. What is computed does not depend on the grid.
    """

    pieces: int
    each: int
    resident: int

    THREADS: ClassVar[int] = 256  # SHARE_THREADS
    LOADS: ClassVar[int] = 4

    @staticmethod
    def of_rows(map_: Array, resident: int = 3) -> "Share":
        """For a kernel that loads the pieces of LOADS rows at a time."""
        return Share(map_.size // piece_of(map_.dtype), Share.LOADS, resident)

    @staticmethod
    def of_windows(pooled: Array, resident: int = 3) -> "Share":
        """For a kernel that goes from window to window."""
        return Share(pooled.size // piece_of(pooled.dtype), 1, resident)

    def grid(self, device: Device) -> int:
        """Blocks of THREADS."""
        return min(-(-self.pieces // (self.each * self.THREADS)), self.resident * device.multiprocessors)


def tiles_of(rows: int) -> int:
    """How many tiles cover so many rows."""
    return -(-rows // TILE_ROWS)


def rounded(array: np.ndarray, storage: np.dtype) -> np.ndarray:
    """What is stored of an array, in the array's own type."""
    return array.astype(BFLOAT16).astype(array.dtype) if storage == BFLOAT16 else array


def in_float32(op: Op, b: Buffers, compute: Callable[[Buffers], None]) -> None:
    """Lets NumPy compute with float32 in place of bfloat16, and rounds the outputs (and inputs that are updated)."""
    wide = Buffers(**{k: _wide(array) for k, array in vars(b).items()})
    compute(wide)
    for name in (*op.outputs, *op.updates):
        target = getattr(b, name)
        if target.dtype == BFLOAT16:
            target[...] = getattr(wide, name)


def _wide(array: np.ndarray | None) -> np.ndarray | None:
    return array.astype(np.float32) if array is not None and array.dtype == BFLOAT16 else array
