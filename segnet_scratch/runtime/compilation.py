"""Compiles what is going to be launched before the first launch, on all cores: one by one it would take minutes."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes, Kernel, Launch
from segnet_scratch.runtime.observe import Observer, current_observer, observe
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

    Inside `launched_by` they join its list. CompileError for the first that does not compile.
    """
    if isinstance(outer := current_observer(), _Listing):
        outer.kernels += kernels
        return
    distinct = {(kernel.source.digest, types): (kernel, types) for kernel, types in kernels}
    on_all_cores(lambda pair: device.compile(*pair), list(distinct.values()), progress)


def launched_by(run: Callable[[], None]) -> list[tuple[Kernel, ElementTypes]]:
    """The kernels that `run` would launch: they are written down, and nothing is computed."""
    listing = _Listing()
    with observe(listing):
        run()
    return listing.kernels


class _Listing(Observer):
    def __init__(self) -> None:
        self.kernels: list[tuple[Kernel, ElementTypes]] = []

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        self.kernels.append((launch.kernel, launch.types))
