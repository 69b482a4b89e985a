"""The two devices of the CPU. Their arrays are NumPy arrays."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.runtime import host as host_kernels
from segnet_scratch.runtime.devices.base import Array, Device
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.observe import Launch
from segnet_scratch.runtime.signature import ElementTypes, Kernel


class NumpyDevice(Device):
    """NumPy on the CPU: the oracle, and the trainer of machines without a GPU."""

    name = "numpy"
    runs_kernels = False

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return np.empty(tuple(shape), dtype)

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return np.zeros(tuple(shape), dtype)

    def upload(self, array: np.ndarray) -> Array:
        return np.asarray(array, order="C")

    def download(self, array: Array) -> np.ndarray:
        return np.asarray(array)

    def from_dlpack(self, array: Any) -> Array:
        return self.upload(np.from_dlpack(array))

    def owns(self, array: Any) -> bool:
        return isinstance(array, np.ndarray)

    def address(self, array: Array) -> int:
        return int(array.__array_interface__["data"][0])


class HostDevice(NumpyDevice):
    """The CUDA kernels, compiled by the system's C++ compiler, every CUDA thread a fiber."""

    name = "host"
    runs_kernels = True

    def __init__(self, options: HostOptions | None = None) -> None:
        self.options = options or HostOptions()
        host_kernels.find_compiler()  # a missing compiler is reported here, not in the middle of a training step

    def with_options(self, **changes: Any) -> "HostDevice":
        """Another host device whose options differ in these."""
        return HostDevice(replace(self.options, **changes))

    def compile(self, kernel: Kernel, types: ElementTypes) -> None:
        host_kernels.prepare(kernel, types, self.options)

    def execute(self, launch: Launch) -> None:
        host_kernels.run(launch, self.options)
