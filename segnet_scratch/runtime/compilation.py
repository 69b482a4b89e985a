"""Compiles what is going to be launched before the first launch, on all cores: one by one it would take minutes."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.launch import ElementTypes, Kernel
from segnet_scratch.runtime.observe import Listener, observe
from segnet_scratch.runtime.workers import worker_count

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # is told how many are done of how many


def no_progress(done: int, total: int) -> None:
    """Says nothing."""


def on_all_cores(
    function: Callable[[Item], Result], items: Sequence[Item], progress: Progress = no_progress
) -> list[Result]:
    """What `function` makes of each item, in their order. Threads will do: compilers run without Python's lock."""
    pool = ThreadPoolExecutor(worker_count())
    try:
        results = []
        for result in pool.map(function, items):
            results.append(result)
            progress(len(results), len(items))
        return results
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the rest need not be compiled


def compile_for(
    device: Device, kernels: Iterable[tuple[Kernel, ElementTypes]], progress: Progress = no_progress
) -> None:
    """Compiles kernels for a device, each source and pair of element types once; what the cache has is there at once.

    CompileError for the first that does not compile.
    """
    distinct = {(kernel.source.digest, types): (kernel, types) for kernel, types in kernels}
    on_all_cores(lambda pair: device.compile(*pair), list(distinct.values()), progress)


def launched_by(run: Callable[[Device], None], device: Device) -> list[tuple[Kernel, ElementTypes]]:
    """The kernels that `run` launches on a device. It is given one in its place that launches nothing."""
    listing = _Listing(device)
    with observe(Listener()):
        run(listing)
    return listing.kernels


class _Listing(Device):
    """A device with the arrays of another one that writes down what is launched, and does not."""

    runs_kernels = True

    def __init__(self, device: Device) -> None:
        self.device, self.name, self.architecture = device, device.name, device.architecture
        self.gpu, self.multiprocessors = device.gpu, device.multiprocessors
        self.kernels: list[tuple[Kernel, ElementTypes]] = []

    def execute(self, kernel: Kernel, types: ElementTypes, *launch: Any) -> None:
        self.kernels.append((kernel, types))

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self.device.empty(shape, dtype)

    def constant(self, array: np.ndarray) -> Array:
        return self.device.constant(array)

    def owns(self, array: Any) -> bool:
        return self.device.owns(array)

    def address(self, array: Array) -> int:
        return self.device.address(array)
