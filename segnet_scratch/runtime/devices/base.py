"""What every device offers: memory, execution of kernels, and the two ways to keep a GPU busy."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DeviceError
from segnet_scratch.runtime.devices.timer import Timer
from segnet_scratch.runtime.machine import available_memory
from segnet_scratch.runtime.observe import Launch
from segnet_scratch.runtime.signature import ElementTypes, Kernel

Array = Any  # numpy.ndarray or cupy.ndarray
Item = TypeVar("Item")
Result = TypeVar("Result")


class PendingDownload:
    """Arrays on their way from a device to the host; from the CPU they have arrived at once."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)

    @property
    def ready(self) -> bool:
        """Have they arrived?"""
        return True

    def get(self) -> list[np.ndarray]:
        """The arrays; waits for them, and for nothing that was asked of the device later."""
        return self._arrays


class Device:
    """Memory and execution of one device: where a subclass does not say otherwise, those of the CPU."""

    name: str
    runs_kernels: bool  # True: ops launch kernels; False: ops compute with NumPy
    architecture: str | None = None  # of a GPU, as NVRTC names it: "sm_90"
    gpu: str | None = None  # its name: "NVIDIA H100 80GB HBM3"
    multiprocessors: int = 1  # of a GPU; grids that fill the device once follow from it

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An array with undefined contents."""
        return np.empty(tuple(shape), dtype)

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """An array of zeros."""
        return np.zeros(tuple(shape), dtype)

    def upload(self, array: np.ndarray) -> Array:
        """A C-contiguous array of this device with the same contents; NumPy arrays may be shared, not copied."""
        return np.asarray(array, order="C")

    def constant(self, array: np.ndarray) -> Array:
        """As `upload`, for an array that nobody writes to later; allowed while `capture` records, too."""
        return self.upload(array)

    def download(self, array: Array) -> np.ndarray:
        """The contents as a NumPy array."""
        return np.asarray(array)

    def download_async(self, arrays: Sequence[Array]) -> PendingDownload:
        """As `download`, of the contents after all work that the device has been given so far; waits for nothing."""
        return PendingDownload([np.array(self.download(array)) for array in arrays])

    def from_dlpack(self, array: Any) -> Array:
        """An array of another library (PyTorch, JAX, CuPy) on this device, shared where the library allows it."""
        return self.upload(np.from_dlpack(array))

    def copy(self, array: Array) -> Array:
        """Another array with the same contents."""
        return array.copy()

    def write(self, target: Array, values: Any) -> None:
        """Overwrites an array of this device in place."""
        target[...] = values

    def owns(self, array: Any) -> bool:
        """Is this an array of the device?"""
        return isinstance(array, np.ndarray)

    def address(self, array: Array) -> int:
        """The address of the array's first element."""
        return int(array.__array_interface__["data"][0])

    def gpu_identity(self) -> str | None:
        """What tells a GPU from others of its machine; None where there is none."""
        return None

    def stream(self) -> int:
        """The handle of a GPU's current stream, for libraries that add work to it."""
        raise DeviceError(f"the {self.name} device has no streams; use cuda")

    def free_memory(self) -> int | None:
        """Bytes that arrays of this device may still take; None where nobody knows."""
        return available_memory()

    def synchronise(self) -> None:
        """Waits until all work given to the device is done."""

    def prefetch(
        self, items: Iterator[Item], arrays_of: Callable[[Item], Sequence[np.ndarray]]
    ) -> Generator[tuple[Item, tuple[Array, ...]], None, None]:
        """Every item with its arrays on this device; a GPU copies those of the next item while one is worked on.

        The arrays belong to the caller until it asks for the next item: on a GPU their memory is then used again. An
        exception of `items` or `arrays_of` is raised where its item would have come.
        """
        for item in items:
            yield item, tuple(self.upload(array) for array in arrays_of(item))

    def side_stream(self) -> AbstractContextManager[None]:
        """Within this context work goes to a second stream: after all before it, and beside what follows until `join`.

        A device without streams runs it at once.
        """
        return nullcontext()

    def join(self) -> None:
        """Has the work from here on wait for the side stream."""

    def capture(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """What does the same as calling `function` again and again, at less cost on a GPU.

        There the kernels that it launches are recorded, not run, and each call replays the recording: no Python in
        between, every array at the address it had. So `function` must have run before (its kernels are loaded then),
        may not upload, download or wait, and what it reads must be overwritten in place between two calls. Its result
        is the same arrays each time.
        """
        return function

    def execute(self, launch: Launch) -> None:
        """Runs a kernel whose arguments the launch gate has checked; only `runtime.launch` calls this."""
        raise DeviceError(f"the {self.name} device runs no kernels; use host or cuda")

    def compile(self, kernel: Kernel, types: ElementTypes) -> None:
        """Makes a kernel ready for its first launch; from any thread. Nothing where no kernels run."""

    def timer(self) -> Timer:
        """Takes time on this device's own clock."""
        return Timer()

    def __repr__(self) -> str:
        return f"<device {self.name}>"
