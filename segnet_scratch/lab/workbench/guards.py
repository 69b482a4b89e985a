"""Guard zones: memory of known contents before and after an array, so that an access outside of it shows.

A write is seen afterwards in the bytes. A read is seen because two runs have unlike guard zones; under AddressSanitizer
the zones are out of bounds as well, and it stops at the line that touches them.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from segnet_scratch.runtime.devices import Array

GUARD = 1024  # elements before and after every array


@dataclass(frozen=True)
class Fill:
    """What outputs and guard zones hold before a run."""

    float32: int  # bits
    float64: int
    integer_byte: int
    guard_byte: int

    def of(self, dtype: np.dtype) -> np.ndarray:
        """One element of an output."""
        if dtype.kind == "f":
            return np.array(getattr(self, dtype.name), f"u{dtype.itemsize}").view(dtype)
        return np.full(dtype.itemsize, self.integer_byte, np.uint8).view(dtype)[0]


# A NaN that no computation makes, between guard zones of NaN: a kernel that reads what it should not gets NaN.
FIRST = Fill(0x7FE5EED5, 0x7FFC5EED5EED5EED, 0xA5, 0xFF)
# Ordinary numbers.
SECOND = Fill(0x3F3C5EED, 0x3FE78BDDA0000000, 0x5A, 0x3C)
# Tells apart what SECOND changes: outputs as in the first run, guard zones as in the second.
OTHER_GUARDS = Fill(FIRST.float32, FIRST.float64, FIRST.integer_byte, SECOND.guard_byte)


def between_guards(
    contents: np.ndarray, byte: int, allocate: Callable[[int], np.ndarray] = lambda size: np.empty(size, np.uint8)
) -> np.ndarray:
    """One dimension with guard zone, contents, guard zone. `allocate` makes so many bytes."""
    buffer = allocate((contents.size + 2 * GUARD) * contents.itemsize)
    buffer[...] = byte
    elements = buffer.view(contents.dtype)
    inside(elements, contents.shape)[...] = contents  # not reshape(-1): a fill is broadcast, and would be copied
    return elements


def inside(buffer: Array, shape: tuple[int, ...]) -> Array:
    """The array between its guard zones, on any device; a view."""
    return buffer[GUARD:-GUARD].reshape(shape)


def damage(name: str, buffer: np.ndarray, byte: int) -> list[str]:
    """Writes outside the array, each with the element next to the array."""
    reports = []
    size = buffer.size - 2 * GUARD
    for where, zone in (("before its start", buffer[:GUARD]), ("past its end", buffer[-GUARD:])):
        hit = (zone.view(np.uint8).reshape(GUARD, -1) != byte).any(axis=1).nonzero()[0]
        if hit.size == 0:
            continue
        nearest = int(hit[-1]) - GUARD if where == "before its start" else int(hit[0]) + size
        reports.append(
            f"{name}: {hit.size} element{'s' if hit.size > 1 else ''} written {where}, the nearest is "
            f"{name}[{nearest}]; the array has {size} elements"
        )
    return reports


@dataclass(frozen=True)
class Region:
    """Where an array lies between its guard zones: what a sanitizer's report is read with."""

    start: int
    nbytes: int
    itemsize: int

    @staticmethod
    def of(buffer: np.ndarray) -> "Region":
        """That of the array inside a buffer."""
        guard = GUARD * buffer.itemsize
        return Region(buffer.ctypes.data + guard, buffer.nbytes - 2 * guard, buffer.itemsize)


def forbid(buffer: np.ndarray) -> None:
    """Makes the guard zones out of bounds, in a process that runs under AddressSanitizer."""
    _mark("poison", buffer)


def allow(buffer: np.ndarray) -> None:
    """Takes `forbid` back, before anybody else reads the zones or uses the memory."""
    _mark("unpoison", buffer)


def _mark(how: str, buffer: np.ndarray) -> None:
    mark = getattr(ctypes.CDLL(None), f"__asan_{how}_memory_region")
    mark.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    guard = GUARD * buffer.itemsize
    mark(buffer.ctypes.data, guard)
    mark(buffer.ctypes.data + buffer.nbytes - guard, guard)
