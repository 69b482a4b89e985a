"""The two devices of the CPU. Their arrays are NumPy arrays."""

from dataclasses import replace
from typing import Any

from segnet_scratch.runtime import host as host_kernels
from segnet_scratch.runtime.devices.base import Device
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.observe import Launch
from segnet_scratch.runtime.signature import ElementTypes, Kernel


class NumpyDevice(Device):
    """NumPy on the CPU: the oracle, and the trainer of machines without a GPU."""

    name = "numpy"
    runs_kernels = False


class HostDevice(Device):
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
