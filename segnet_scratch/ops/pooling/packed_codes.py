"""Pooling codes in two bits a window, as the paper stores them: what the fused engine keeps of a pool, and its unpool.

Packed codes are uint8 (n, ceil(h/2), ceil(w/2), c / 4); the code of channel k is bits 2 (k % 4) and up of byte k // 4.
cuda/common/packed_codes.cuh is the kernels' side. A code that points outside the map, which no pool writes, names
nothing: its value is lost in an unpool, and its gradient is 0.
"""

from collections.abc import Sequence

import numpy as np

from segnet_scratch.ops.op import Buffers, Spec, expect, spec_of
from segnet_scratch.ops.pooling.max_pool import MaxPoolForward
from segnet_scratch.ops.pooling.windows import CODE, gather, scatter, windows_of

CODES_OF_BYTE = 4
_SHIFTS = np.arange(0, 2 * CODES_OF_BYTE, 2, dtype=CODE)


def packed_codes(pooled: Sequence[int]) -> Spec:
    """The packed codes of a pooled map (n, ph, pw, c); ShapeError unless c is a multiple of 4."""
    *windows, c = pooled
    expect(c % CODES_OF_BYTE == 0, f"packed codes of {c} channels: expected a multiple of {CODES_OF_BYTE}")
    return Spec((*windows, c // CODES_OF_BYTE), CODE)


def unpooled(op: str, values: Spec, size: tuple[int, int]) -> Spec:
    """The map (n, *size, c) that values (n, ceil(h/2), ceil(w/2), c) are unpooled to; ShapeError for another size."""
    n, *_, c = values.shape
    pooled = windows_of(n, *size, c)
    what = f"{op}: the values have shape {values.shape}; a pool of a map of size {size} has {pooled}"
    expect(values.shape == pooled, what)
    return values.with_shape(n, *size, c)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Codes 0..3 (..., c), four to a byte (..., c / 4)."""
    fours = codes.reshape(*codes.shape[:-1], -1, CODES_OF_BYTE)
    return np.bitwise_or.reduce(fours << _SHIFTS, axis=-1)


def unpack_codes(packed: np.ndarray) -> np.ndarray:
    """The codes (..., c) of packed ones (..., c / 4)."""
    codes = packed[..., None] >> _SHIFTS & 3
    return codes.reshape(*packed.shape[:-1], -1)


def scatter_from(values: np.ndarray, packed: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The map (n, *size, c) with each value (n, ph, pw, c) at its coded position and zeros elsewhere."""
    out = np.empty((values.shape[0], *size, values.shape[3]), values.dtype)
    scatter(values, unpack_codes(packed), out)
    return out


def gather_at(map_: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """The element of each window (n, ph, pw, c) that its code names; 0 where it names none."""
    codes = unpack_codes(packed)
    out = np.empty(codes.shape, map_.dtype)
    gather(map_, codes, out)
    return out


def max_pool_packed(x: np.ndarray, pooled: np.ndarray, packed: np.ndarray) -> None:
    """The 2x2 max-pool of a map by its definition, with packed codes."""
    codes = np.empty(pooled.shape, CODE)
    MaxPoolForward.plan(spec_of(x)).reference(Buffers(x=x, y=pooled, codes=codes))
    packed[...] = pack_codes(codes)
