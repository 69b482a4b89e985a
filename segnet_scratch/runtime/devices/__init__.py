"""The three devices behind one small interface, and how one is chosen.

`numpy` computes with NumPy; `host` runs the CUDA kernels on the CPU; `cuda` runs them on a GPU. Arrays of `numpy` and
`host` are NumPy arrays, arrays of `cuda` are CuPy arrays. Code above `ops/` never asks which device it runs on.
"""

import functools
import threading

from segnet_scratch.errors import DeviceError
from segnet_scratch.runtime.devices.base import Array, Device, PendingDownload
from segnet_scratch.runtime.devices.cpu import HostDevice, NumpyDevice
from segnet_scratch.runtime.devices.cuda import CudaDevice
from segnet_scratch.runtime.devices.cupy_library import cuda_missing, cupy_facts, nccl_library
from segnet_scratch.runtime.devices.timer import Timer

__all__ = [
    "Array",
    "CudaDevice",
    "Device",
    "HostDevice",
    "NumpyDevice",
    "PendingDownload",
    "Timer",
    "cuda_missing",
    "cupy_facts",
    "get_device",
    "nccl_library",
]

NAMES = ("auto", "cuda", "host", "numpy")


_creating = threading.Lock()


@functools.cache
def _shared_device(name: str) -> Device:
    if name == "numpy":
        return NumpyDevice()
    return HostDevice() if name == "host" else CudaDevice()


def get_device(device: "str | Device" = "auto") -> Device:
    """The device of a name: "cuda", "host", "numpy", or "auto" (cuda where CuPy sees a GPU, else numpy).

    Raises DeviceError where the device is missing, with what to install.
    """
    if isinstance(device, Device):
        return device
    if device not in NAMES:
        raise DeviceError(f"there is no device {device!r}; expected one of {', '.join(NAMES)}")
    if device == "auto":
        device = "numpy" if cuda_missing() else "cuda"
    with _creating:  # `cache` alone could give two threads two devices, whose tensors do not meet
        return _shared_device(device)
