"""The arrays of a run, each between guard zones, filled so that they give away what a kernel should not have done.

A kernel is run twice, with two fills. An element that holds the fill both times was never written. One that holds
something else, but not the same both times, depends on what lay there before or beside it.
"""

from collections.abc import Callable
from math import prod

import numpy as np

from segnet_scratch.errors import LaunchError
from segnet_scratch.lab.workbench.guards import GUARD, Fill, GuardedArrays
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.runtime.devices import Array, Device


def place(
    setup: Setup, device: Device, fill: Fill, allocate: Callable[[int], np.ndarray] | None = None
) -> tuple[GuardedArrays, dict[str, Array | None]]:
    """The guarded arrays of a setup, and the arrays themselves by name; None for a null pointer."""
    guarded = GuardedArrays(device, fill, *([allocate] if allocate else []))
    arrays: dict[str, Array | None] = {}
    for name, shape in setup.shapes.items():
        dtype = setup.dtype(name)
        if name in setup.contents and setup.contents[name] is None:
            arrays[name] = None
            continue
        try:
            arrays[name] = guarded.add(name, setup.contents.get(name), shape, dtype)
        except (MemoryError, OSError, OverflowError, ValueError) as error:
            size = (prod(shape) + 2 * GUARD) * dtype.itemsize
            raise LaunchError(f"{setup.kernel.name}: no memory for {name} {shape}, {size} bytes: {error}") from error
    return guarded, arrays
