"""A device that allocates and launches without computing: a step's counts and memory, at any size, in a moment."""

import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.runtime.devices import Array, NumpyDevice
from segnet_scratch.runtime.launch import Launch


class CountingDevice(NumpyDevice):
    """Says yes to every launch and carries none out. Arrays are address space that is never touched.

    `live` and `peak` are the bytes of arrays that ops and models hold, now and at most.
    """

    name = "counting"
    runs_kernels = True

    def __init__(self) -> None:
        self.live = self.peak = 0

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._counted(np.empty(tuple(shape), dtype))

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._counted(np.zeros(tuple(shape), dtype))

    def upload(self, array: np.ndarray) -> Array:
        return self._counted(np.array(array, order="C"))

    def _counted(self, array: np.ndarray) -> np.ndarray:
        nbytes = prod(array.shape) * array.itemsize
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(array, self._release, nbytes)
        return array

    def _release(self, nbytes: int) -> None:
        self.live -= nbytes

    def execute(self, launch: Launch) -> None:
        pass
