"""The arrays of a run, each between guard zones, filled so that they give away what a kernel should not have done.

A kernel is run twice, with two fills. An element that holds the fill both times was never written. One that holds
something else, but not the same both times, depends on what lay there before or beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from segnet_scratch.errors import LaunchError
from segnet_scratch.kernels.workbench.setup import Setup

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


class Placement:
    """Memory for the arrays of one run. `allocate` makes the bytes, so that they can be shared between processes."""

    def __init__(self, setup: Setup, fill: Fill, allocate: Callable[[int], np.ndarray]) -> None:
        self.fill = fill
        self.buffers: dict[str, np.ndarray] = {}  # guard zone, array, guard zone
        self.arrays: dict[str, np.ndarray | None] = {}
        for name, shape in setup.shapes.items():
            dtype = setup.dtype(name)
            content = setup.contents.get(name, fill.of(dtype))
            if content is None:
                self.arrays[name] = None
                continue
            size = (prod(shape) + 2 * GUARD) * dtype.itemsize
            try:
                buffer = allocate(size)
            except (MemoryError, OSError, OverflowError, ValueError) as error:
                raise LaunchError(
                    f"{setup.kernel.name}: no memory for {name} {shape}, {size} bytes: {error}"
                ) from error
            buffer[...] = fill.guard_byte
            self.buffers[name] = buffer.view(dtype)
            self.buffers[name][GUARD:-GUARD] = content.reshape(-1)
            self.arrays[name] = self.buffers[name][GUARD:-GUARD].reshape(shape)

    def damage(self, setup: Setup) -> list[str]:
        """Writes outside the arrays, each with the element next to the array."""
        reports = []
        for name, buffer in self.buffers.items():
            size = prod(setup.shapes[name])
            for where, zone in (("before its start", buffer[:GUARD]), ("past its end", buffer[-GUARD:])):
                hit = (zone.view(np.uint8).reshape(GUARD, -1) != self.fill.guard_byte).any(axis=1).nonzero()[0]
                if hit.size == 0:
                    continue
                nearest = int(hit[-1]) - GUARD if where == "before its start" else int(hit[0]) + size
                reports.append(
                    f"{name}: {hit.size} element{'s' if hit.size > 1 else ''} written {where}, the nearest is "
                    f"{name}[{nearest}]; the array has {size} elements"
                )
        return reports
