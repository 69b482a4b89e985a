"""The three devices behind one small interface. This is the only file that imports CuPy.

`numpy` computes with NumPy; `host` runs the CUDA kernels on the CPU; `cuda` runs them on a GPU. Arrays of `numpy` and
`host` are NumPy arrays, arrays of `cuda` are CuPy arrays. Code above `ops/` never asks which device it runs on.
"""

import functools
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DeviceError
from segnet_scratch.kernels import ElementTypes, Kernel
from segnet_scratch.kernels import host as host_kernels
from segnet_scratch.kernels.host import HostOptions

Array = Any  # numpy.ndarray or cupy.ndarray
DLPACK_CPU = (1, 3)  # kDLCPU and kDLCUDAHost: memory of the CPU, pinned in the second case


class Timer:
    """Marks in the sequence of a device's work, and the time between two of them."""

    def mark(self) -> Any:
        """A moment: when all work given to the device so far is done."""
        return perf_counter()

    def seconds(self, first: Any, last: Any) -> float:
        """The time from one mark to a later one; waits until the device has reached it."""
        return last - first


class _EventTimer(Timer):
    """CUDA events on the current stream: the GPU itself takes the time, nothing waits while marks are made."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def mark(self) -> Any:
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        last.synchronize()
        return self._cupy.cuda.get_elapsed_time(first, last) / 1e3


class Device:
    """Memory and execution of one device."""

    name: str
    runs_kernels: bool  # True: ops launch kernels; False: ops compute with NumPy

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An array with undefined contents."""
        raise NotImplementedError

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An array of zeros."""
        raise NotImplementedError

    def upload(self, array: np.ndarray) -> Array:
        """A C-contiguous array of this device with the same contents; NumPy arrays may be shared, not copied."""
        raise NotImplementedError

    def download(self, array: Array) -> np.ndarray:
        """The contents as a NumPy array."""
        raise NotImplementedError

    def from_dlpack(self, array: Any) -> Array:
        """An array of another library (PyTorch, JAX, CuPy) on this device, shared where the library allows it."""
        raise NotImplementedError

    def copy(self, array: Array) -> Array:
        """Another array with the same contents."""
        return array.copy()

    def write(self, target: Array, values: Any) -> None:
        """Overwrites an array of this device in place."""
        target[...] = values

    def owns(self, array: Any) -> bool:
        """Is this an array of the device?"""
        raise NotImplementedError

    def address(self, array: Array) -> int:
        """The address of the array's first element."""
        raise NotImplementedError

    def synchronise(self) -> None:
        """Waits until all work given to the device is done."""

    def execute(
        self,
        kernel: Kernel,
        types: ElementTypes,
        grid: Sequence[int],
        block: Sequence[int],
        values: Sequence[Any],
        shared: int,
    ) -> None:
        """Runs a kernel whose arguments the launch gate has checked; only `kernels.launch` calls this."""
        raise DeviceError(f"the {self.name} device runs no kernels; use host or cuda")

    def timer(self) -> Timer:
        """Takes time on this device's own clock."""
        return Timer()

    def __repr__(self) -> str:
        return f"<device {self.name}>"


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

    def execute(
        self,
        kernel: Kernel,
        types: ElementTypes,
        grid: Sequence[int],
        block: Sequence[int],
        values: Sequence[Any],
        shared: int,
    ) -> None:
        host_kernels.run(kernel, types, grid, block, values, shared, self.options)


class CudaDevice(Device):
    """The CUDA kernels on an NVIDIA GPU, through CuPy: its memory pool, its current stream, its RawKernels."""

    name = "cuda"
    runs_kernels = True

    def __init__(self) -> None:
        reason = cuda_missing()
        if reason:
            raise DeviceError(reason)
        self._cupy = _import_cupy()
        gpu = self._cupy.cuda.Device()
        major, minor = int(gpu.compute_capability[:-1]), int(gpu.compute_capability[-1])
        if (major, minor) < (7, 5):
            raise DeviceError(
                f"the GPU has compute capability {major}.{minor}; 7.5 (Turing) or newer is needed; "
                "use --device numpy or --device host"
            )
        self.architecture = f"sm_{major}{minor}"
        self._modules: dict[tuple[str, ElementTypes], Any] = {}  # by the source's digest
        self._functions: dict[tuple[str, str, ElementTypes], Any] = {}  # by digest and kernel

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._guarded(lambda: self._cupy.empty(tuple(shape), dtype))

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._guarded(lambda: self._cupy.zeros(tuple(shape), dtype))

    def upload(self, array: np.ndarray) -> Array:
        return self._guarded(lambda: self._cupy.asarray(np.asarray(array, order="C")))

    def download(self, array: Array) -> np.ndarray:
        return self._cupy.asnumpy(array)

    def from_dlpack(self, array: Any) -> Array:
        if array.__dlpack_device__()[0] in DLPACK_CPU:  # CuPy takes arrays on GPUs only
            return self.upload(np.from_dlpack(array))
        return self._guarded(lambda: self._cupy.ascontiguousarray(self._cupy.from_dlpack(array)))

    def copy(self, array: Array) -> Array:
        return self._guarded(array.copy)

    def write(self, target: Array, values: Any) -> None:
        if isinstance(values, np.ndarray):
            target.set(np.asarray(values, dtype=target.dtype, order="C"))
        else:
            target[...] = values

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._cupy.ndarray) and array.device == self._cupy.cuda.Device()

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def synchronise(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    def _guarded(self, allocate: Any) -> Array:
        try:
            return allocate()
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            free, total = self._cupy.cuda.runtime.memGetInfo()
            raise DeviceError(
                f"the GPU is out of memory: {error}; {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free; "
                "train with a smaller batch or size"
            ) from error

    def execute(
        self,
        kernel: Kernel,
        types: ElementTypes,
        grid: Sequence[int],
        block: Sequence[int],
        values: Sequence[Any],
        shared: int,
    ) -> None:
        function = self._functions.get((kernel.source.digest, kernel.name, types))
        if function is None:
            function = self._load(kernel, types)
        # A null pointer travels as a 64-bit zero; every other value has its exact type from the gate already.
        arguments = tuple(np.uint64(0) if value is None else value for value in values)
        function(tuple(grid), tuple(block), arguments, shared_mem=shared)

    def timer(self) -> Timer:
        return _EventTimer(self._cupy)

    def _load(self, kernel: Kernel, types: ElementTypes) -> Any:
        from segnet_scratch.kernels.nvrtc import cached_cubin

        key = kernel.source.digest, types
        if key not in self._modules:
            cubin = cached_cubin(kernel.source, types, self.architecture)
            self._modules[key] = self._cupy.RawModule(path=str(cubin))
        self._functions[kernel.source.digest, kernel.name, types] = function = self._modules[key].get_function(
            kernel.name
        )
        return function


def _import_cupy() -> Any:
    import cupy

    return cupy


def cuda_missing() -> str | None:
    """Why the cuda device cannot be used, with the fix; None where it can."""
    try:
        cupy = _import_cupy()
    except Exception as error:  # a CuPy that does not fit NumPy or the CUDA libraries fails in many ways
        return (
            f"the cuda device needs CuPy, which does not import ({error}); pip install 'segnet_scratch[cuda13]' for a "
            "driver of CUDA 13, [cuda12] for CUDA 12; without an NVIDIA GPU use --device numpy or --device host"
        )
    try:
        available = cupy.cuda.is_available()
    except Exception as error:  # CuPy raises driver errors of several kinds; each means the same to the user
        return f"CuPy cannot use the GPU: {error}; check that nvidia-smi works; --device numpy needs no GPU"
    if not available:
        return (
            "CuPy is installed but sees no NVIDIA GPU or driver; check that nvidia-smi works and that "
            "CUDA_VISIBLE_DEVICES does not hide the GPU; --device numpy and --device host need no GPU"
        )
    return None


def cupy_facts() -> dict[str, Any]:
    """What CuPy knows of itself and of the GPUs, for `segnet doctor`. Raises whatever CuPy raises where it is broken.

    "runtime" and "driver" are CUDA versions (13020 is 13.2; a driver of 0 is none), "gpus" have "name", "capability"
    (major, minor) and "bytes", "problem" is CuPy's reason for an empty list.
    """
    cupy = _import_cupy()
    runtime = cupy.cuda.runtime
    facts: dict[str, Any] = {"version": cupy.__version__, "problem": "", "gpus": []}
    facts |= {"runtime": runtime.runtimeGetVersion(), "driver": runtime.driverGetVersion()}
    try:
        for index in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(index)
            capability = properties["major"], properties["minor"]
            name, memory = properties["name"].decode(errors="replace"), properties["totalGlobalMem"]
            facts["gpus"].append({"name": name, "capability": capability, "bytes": memory})
    except Exception as error:  # CuPy raises driver errors of several kinds
        facts["problem"] = str(error)
    return facts


NAMES = ("auto", "cuda", "host", "numpy")


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
    return _shared_device(device)
