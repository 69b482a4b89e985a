"""The arrays of a run, each between guard zones, filled so that they give away what a kernel should not have done.

A kernel is run twice, with two fills. An element that holds the fill both times was never written. One that holds
something else, but not the same both times, depends on what lay there before or beside it.
"""

from collections.abc import Callable
from math import prod

import numpy as np

from segnet_scratch.errors import LaunchError
from segnet_scratch.lab.workbench.guards import GUARD, Fill, between_guards, damage, inside
from segnet_scratch.lab.workbench.setup import Setup


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
            try:
                buffer = between_guards(np.broadcast_to(content, shape), fill.guard_byte, allocate)
            except (MemoryError, OSError, OverflowError, ValueError) as error:
                size = (prod(shape) + 2 * GUARD) * dtype.itemsize
                raise LaunchError(
                    f"{setup.kernel.name}: no memory for {name} {shape}, {size} bytes: {error}"
                ) from error
            self.buffers[name] = buffer
            self.arrays[name] = inside(buffer, shape)

    def damage(self) -> list[str]:
        """Writes outside the arrays, each with the element next to the array."""
        return [
            report for name, buffer in self.buffers.items() for report in damage(name, buffer, self.fill.guard_byte)
        ]
