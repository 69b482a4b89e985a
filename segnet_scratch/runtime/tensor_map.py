"""Tensor maps: what Hopper's tensor memory accelerator (cuda/common/tma.cuh) is told of an array before a launch.

A kernel takes one as `const __grid_constant__ TensorMap x`. On the host device the description is a plain structure of
128 bytes, on a GPU what the driver makes of the same numbers: 128 bytes that only the hardware understands.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from segnet_scratch.errors import DeviceError, DTypeError, LaunchError, ShapeError
from segnet_scratch.runtime.precision import BFLOAT16

BYTES = 128
SWIZZLE = 128  # bytes of shared memory within which pieces of 16 bytes are exchanged
_SWIZZLE_128 = 3  # CU_TENSOR_MAP_SWIZZLE_128B
# CUtensorMapDataType of the driver, by element type.
_DATA_TYPES = {np.dtype(np.uint8): 0, np.dtype(np.float32): 7, np.dtype(np.float64): 8, BFLOAT16: 9}
_L2_PROMOTION_256 = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B: a miss fetches 256 bytes
_MAGIC = int.from_bytes(b"TMAP", "little")


@dataclass(frozen=True)
class Im2col:
    """The pixels at which a filter's first tap stands: from `lower` to the last pixel plus `upper`, both (y, x).

    Of a 3x3 filter with padding 1 both are (-1, -1): from -1 to height - 2, width - 2.
    """

    lower: tuple[int, int]
    upper: tuple[int, int]


@dataclass(frozen=True)
class TensorMap:
    """Boxes of an array that one thread has copied to shared memory.

    `array` has two to four dimensions and is contiguous; `box` is the box's size in its dimensions, in the array's
    order: (1, 10, 10, 64) of (n, h, w, c). (The coordinates that a kernel gives are in the opposite order, innermost
    first.) Of an `im2col` map, of (n, h, w, c), the box is (pixels, channels). In shared memory pieces of 16 bytes are
    exchanged within SWIZZLE bytes; the box's last dimension is no longer than that. ShapeError, DTypeError or
    LaunchError name what the hardware does not take.
    """

    array: Any
    box: tuple[int, ...]
    im2col: Im2col | None = None

    def __post_init__(self) -> None:
        shape, size = tuple(self.array.shape), self.array.itemsize
        what = f"tensor map of an array {shape}"
        if not 2 <= len(shape) <= 4 or (self.im2col and len(shape) != 4):
            raise ShapeError(f"{what}: expected {'4 (n, h, w, c)' if self.im2col else '2 to 4'} dimensions; reshape it")
        if np.dtype(self.array.dtype) not in _DATA_TYPES:
            known = ", ".join(dtype.name for dtype in _DATA_TYPES)
            raise DTypeError(f"{what}: element type {self.array.dtype}; expected one of {known}")
        if not self.array.flags.c_contiguous:
            raise LaunchError(
                f"{what}: is a view with strides {self.array.strides}; expected a C-contiguous array; copy it"
            )
        limits = (1024, 256) if self.im2col else (256,) * len(shape)
        if len(self.box) != len(limits) or any(not 1 <= n <= m for n, m in zip(self.box, limits, strict=True)):
            names = "(pixels, channels)" if self.im2col else "a size for each dimension"
            raise ShapeError(f"{what}: box {self.box}; expected {names}, each at least 1 and at most {limits}")
        if any(not 1 <= n < 2**32 for n in shape):
            raise ShapeError(f"{what}: expected sizes from 1 to 2^32 - 1")
        row, inner = shape[-1] * size, self.box[-1] * size
        if row % 16:
            raise ShapeError(f"{what}: rows of {row} bytes; expected a multiple of 16; pad the last dimension")
        if inner % 16 or inner > SWIZZLE:
            wanted = f"a multiple of 16, at most the swizzle's {SWIZZLE}"
            raise ShapeError(f"{what}: a box with rows of {inner} bytes; expected {wanted}")
        if self.im2col:
            for corner in (*self.im2col.lower, *self.im2col.upper):
                if not -128 <= corner < 128:
                    raise ShapeError(f"{what}: {self.im2col}; corners are from -128 to 127")
            for n, lower, upper in zip(shape[1:3], self.im2col.lower, self.im2col.upper, strict=True):
                if n + upper <= lower:
                    raise ShapeError(f"{what}: {self.im2col} leaves no pixel; a filter is larger than the padded map")

    @property
    def nbytes(self) -> int:
        """Bytes of a box in shared memory: what a load counts at its mbarrier."""
        return prod(self.box) * int(self.array.itemsize)

    @property
    def _inner_first(self) -> tuple[list[int], list[int]]:
        """Sizes, and strides in bytes from the second dimension on, innermost dimension first."""
        sizes = [int(n) for n in reversed(self.array.shape)]
        strides = [prod(sizes[:d]) * int(self.array.itemsize) for d in range(1, len(sizes))]
        return sizes, strides

    def host_bytes(self) -> np.ndarray:
        """host::MapFields of cuda/common/host_hopper.h: 128 bytes at a multiple of 64."""
        sizes, strides = self._inner_first
        blob = aligned_bytes()
        fields = _HostMap.from_address(blob.ctypes.data)
        fields.magic, fields.rank, fields.im2col = _MAGIC, len(sizes), self.im2col is not None
        fields.element, fields.address = self.array.itemsize, self.array.ctypes.data
        fields.strides[: len(strides)] = strides
        fields.sizes[: len(sizes)] = sizes
        fields.box[: len(self.box)] = self.box[::-1]
        if self.im2col:
            fields.lower[:] = self.im2col.lower[::-1]
            fields.upper[:] = self.im2col.upper[::-1]
        return blob

    def cuda_bytes(self, address: int) -> np.ndarray:
        """CUtensorMap, as the driver makes it for an array at this address: 128 bytes at a multiple of 64."""
        sizes, strides = self._inner_first
        blob = aligned_bytes()
        head = (ctypes.c_void_p(blob.ctypes.data), _DATA_TYPES[np.dtype(self.array.dtype)], len(sizes))
        tensor = (ctypes.c_void_p(address), _numbers(ctypes.c_uint64, sizes), _numbers(ctypes.c_uint64, strides))
        tail = (_numbers(ctypes.c_uint32, [1] * len(sizes)), 0, _SWIZZLE_128, _L2_PROMOTION_256, 0)
        box = self.box[::-1]
        if self.im2col:
            corners = (_numbers(ctypes.c_int, corner[::-1]) for corner in (self.im2col.lower, self.im2col.upper))
            arguments = (*head, *tensor, *corners, box[0], box[1], *tail)
        else:
            arguments = (*head, *tensor, _numbers(ctypes.c_uint32, box), *tail)
        name = "cuTensorMapEncodeIm2col" if self.im2col else "cuTensorMapEncodeTiled"
        status = getattr(_driver(), name)(*arguments)
        if status != 0:
            raise LaunchError(f"{name} refuses {self.describe()} at address {address:#x}: CUDA error {status}")
        return blob

    def describe(self) -> str:
        """One line for messages."""
        kind = f", {self.im2col}" if self.im2col else ""
        return f"a tensor map of {np.dtype(self.array.dtype).name} {tuple(self.array.shape)}, box {self.box}{kind}"


class _HostMap(ctypes.Structure):
    """host::MapFields."""

    _fields_ = (
        ("magic", ctypes.c_uint32),
        *((name, ctypes.c_uint8) for name in ("rank", "im2col", "element")),
        ("address", ctypes.c_uint64),
        ("strides", ctypes.c_uint64 * 4),
        ("sizes", ctypes.c_uint32 * 5),
        ("box", ctypes.c_uint16 * 5),
        ("lower", ctypes.c_int8 * 2),
        ("upper", ctypes.c_int8 * 2),
    )


def aligned_bytes() -> np.ndarray:
    """128 zero bytes at a multiple of 64, which the driver and C++ ask for."""
    memory = np.zeros(BYTES + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + BYTES]


def _numbers(kind: Any, values: Sequence[int]) -> Any:
    return (kind * len(values))(*values)


@functools.cache
def _driver() -> ctypes.CDLL:
    """NVIDIA's driver library."""
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError("tensor maps are made by NVIDIA's driver, and libcuda does not load; check that nvidia-smi works")
