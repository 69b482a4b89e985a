"""The device of an NVIDIA GPU, through CuPy: its memory pool, its current stream, its modules."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DeviceError, DeviceMemoryError
from segnet_scratch.runtime import nvrtc
from segnet_scratch.runtime.devices import cupy_library
from segnet_scratch.runtime.devices.base import Array, Device, Item, PendingDownload, Result
from segnet_scratch.runtime.devices.graph import Recording
from segnet_scratch.runtime.devices.prefetch import PinnedDownload, Prefetcher
from segnet_scratch.runtime.devices.timer import EventTimer, Timer
from segnet_scratch.runtime.observe import Launch
from segnet_scratch.runtime.signature import ElementTypes, Kernel
from segnet_scratch.runtime.tensor_map import TensorMap

# While `capture` records; of each thread its own, as CuPy's current stream and allocator are.
_recording: "ContextVar[Recording[Any] | None]" = ContextVar("recording", default=None)
DLPACK_CPU = (1, 3)  # kDLCPU and kDLCUDAHost: memory of the CPU, pinned in the second case


class CudaDevice(Device):
    """The CUDA kernels on an NVIDIA GPU."""

    name = "cuda"
    runs_kernels = True

    def __init__(self) -> None:
        reason = cupy_library.cuda_missing()
        if reason:
            raise DeviceError(reason)
        self._cupy = cupy_library.import_cupy()
        gpu = self._cupy.cuda.Device()
        major, minor = int(gpu.compute_capability[:-1]), int(gpu.compute_capability[-1])
        if (major, minor) < (7, 5):
            raise DeviceError(
                f"the GPU has compute capability {major}.{minor}; 7.5 (Turing) or newer is needed; "
                "use --device numpy or --device host"
            )
        self.architecture: str = f"sm_{major}{minor}"
        properties = self._cupy.cuda.runtime.getDeviceProperties(gpu.id)
        self.multiprocessors = int(properties["multiProcessorCount"])
        name = properties["name"]
        self.gpu: str = name.decode() if isinstance(name, bytes) else str(name)
        self._side_stream: tuple[Any, Any, Any] | None = None  # the stream; the events of fork and join
        self._modules: dict[tuple[str, ElementTypes], Any] = {}  # by the source's digest
        self._functions: dict[tuple[str, str, ElementTypes], Any] = {}  # by digest and kernel

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._guarded(_nbytes(shape, dtype), lambda: self._cupy.empty(tuple(shape), dtype))

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._guarded(_nbytes(shape, dtype), lambda: self._cupy.zeros(tuple(shape), dtype))

    def upload(self, array: np.ndarray) -> Array:
        self._expect_no_recording("upload an array")
        return self._guarded(array.nbytes, lambda: self._cupy.asarray(np.asarray(array, order="C")))

    def constant(self, array: np.ndarray) -> Array:
        recording = _recording.get()
        if recording is None:
            return self.upload(array)
        return self._guarded(array.nbytes, lambda: recording.constant(np.array(array, order="C")))

    def download(self, array: Array) -> np.ndarray:
        self._expect_no_recording("download an array")
        return self._cupy.asnumpy(array)

    def download_async(self, arrays: Sequence[Array]) -> PendingDownload:
        self._expect_no_recording("download arrays")
        return PinnedDownload(self._cupy, arrays)

    def from_dlpack(self, array: Any) -> Array:
        if array.__dlpack_device__()[0] in DLPACK_CPU:  # CuPy takes arrays on GPUs only
            return self.upload(np.from_dlpack(array))
        shared = self._cupy.from_dlpack(array)
        return self._guarded(shared.nbytes, lambda: self._cupy.ascontiguousarray(shared))

    def copy(self, array: Array) -> Array:
        return self._guarded(array.nbytes, array.copy)

    def write(self, target: Array, values: Any) -> None:
        if isinstance(values, np.ndarray):
            self._expect_no_recording("write an array of the CPU")
            target.set(np.asarray(values, dtype=target.dtype, order="C"))
        else:
            target[...] = values

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._cupy.ndarray) and array.device == self._cupy.cuda.Device()

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def gpu_identity(self) -> str:
        return str(self._cupy.cuda.Device().pci_bus_id)

    def stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)

    def free_memory(self) -> int:
        # CUDA's, and what CuPy holds of arrays that are gone: it hands that out again, or gives it back when short.
        return int(self._cupy.cuda.runtime.memGetInfo()[0]) + int(self._cupy.get_default_memory_pool().free_bytes())

    def without_pool(self) -> None:
        """From now on each array is an allocation of CUDA's own, whose ends compute-sanitizer sees."""
        self._cupy.cuda.set_allocator(None)

    def synchronise(self) -> None:
        self._expect_no_recording("wait for the GPU")
        self._cupy.cuda.get_current_stream().synchronize()

    def prefetch(
        self, items: Iterator[Item], arrays_of: Callable[[Item], Sequence[np.ndarray]]
    ) -> Generator[tuple[Item, tuple[Array, ...]], None, None]:
        return Prefetcher(self._cupy, self.empty).run(items, arrays_of)

    @contextmanager
    def side_stream(self) -> Generator[None]:
        if self._side_stream is None:
            events = (self._cupy.cuda.Event(disable_timing=True) for _ in range(2))
            self._side_stream = self._cupy.cuda.Stream(non_blocking=True), *events
        stream, forked, joined = self._side_stream
        forked.record(self._cupy.cuda.get_current_stream())
        stream.wait_event(forked)
        with stream:
            yield
        joined.record(stream)

    def join(self) -> None:
        if self._side_stream is not None:
            self._cupy.cuda.get_current_stream().wait_event(self._side_stream[2])

    def capture(self, function: Callable[[], Result]) -> Callable[[], Result]:
        self._expect_no_recording("capture once more")
        self._cupy.get_default_memory_pool().free_all_blocks()  # the recording has a pool of its own to fill
        recording = Recording(self._cupy, function)
        _recording.set(recording)
        try:
            return recording.record()
        finally:
            _recording.set(None)

    def _expect_no_recording(self, what: str) -> None:
        if _recording.get() is not None:
            raise DeviceError(
                f"capture: the function tries to {what}, which a graph cannot repeat; do it before or after, and "
                "write inputs into arrays that exist already"
            )

    def _guarded(self, nbytes: int, allocate: Callable[[], Array]) -> Array:
        try:
            return allocate()
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            free, total = self._cupy.cuda.runtime.memGetInfo()
            raise DeviceMemoryError(
                f"the GPU is out of memory: {str(error).rstrip('.')}; {free:,} of {total:,} bytes are free",
                asked=nbytes,
                free=free,
            ) from error

    def execute(self, launch: Launch) -> None:
        kernel, shared = launch.kernel, launch.shared
        function = self._functions.get((kernel.source.digest, kernel.name, launch.types))
        if function is None:
            function = self._load(kernel, launch.types)
        # More than 48 KiB of shared memory are granted to those only who ask.
        if shared and shared > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared
        # A null pointer travels as a 64-bit zero; every other number has its exact type from the gate already.
        arguments = tuple(self._argument(value) for value in launch.arguments)
        function(launch.grid, launch.block, arguments, shared_mem=shared)

    def _argument(self, value: Any) -> Any:
        if value is None:
            return np.uint64(0)
        if isinstance(value, TensorMap):  # any array of one element travels by value: here one of 128 bytes
            return value.cuda_bytes(self.address(value.array)).view("V128")
        return value

    def compile(self, kernel: Kernel, types: ElementTypes) -> None:
        nvrtc.cached_cubin(kernel.source, types, self.architecture)

    def timer(self) -> Timer:
        return EventTimer(self._cupy)

    def _load(self, kernel: Kernel, types: ElementTypes) -> Any:
        self._expect_no_recording(f"launch {kernel.name} for the first time")
        key = kernel.source.digest, types
        if key not in self._modules:
            cubin = nvrtc.cached_cubin(kernel.source, types, self.architecture)
            self._modules[key] = self._cupy.RawModule(path=str(cubin))
        self._functions[kernel.source.digest, kernel.name, types] = function = self._modules[key].get_function(
            kernel.name
        )
        return function


def _nbytes(shape: Sequence[int], dtype: DTypeLike) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
