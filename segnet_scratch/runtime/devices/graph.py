"""CUDA graphs: the launches of one call of a function, recorded once, replayed without Python in between."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic

import numpy as np

from segnet_scratch.runtime.devices.base import Array, Result

MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation


class Recording(Generic[Result]):
    """A function's launches as a CUDA graph; calling it replays them on the current stream.

    A graph knows addresses, not arrays. So memory must not change hands while the graph lives:

    * What the function allocates comes from a pool of the graph's own. Within the recording a freed block may be used
      again, as the launches stay in order; nobody outside ever gets it.
    * That pool never gives blocks back to CUDA. CuPy's pools do when memory is short, but a recorded launch may
      have used the block; so its allocator reports what makes CuPy give up at once.
    * Constants lie outside that pool, filled once when the recording ends: a block of the pool may have been another
      array earlier in the recording, and each replay would overwrite it.
    * Everything else the function itself refers to, and it is kept.

    Recording uses CuPy's relaxed mode, in which memory may be allocated.
    """

    def __init__(self, cupy: Any, function: Callable[[], Result]) -> None:
        self._cupy, self._function = cupy, function
        self._pool = cupy.cuda.MemoryPool(_allocator(cupy.cuda))
        self._pool.set_limit(size=0)  # at the limit of CUPY_GPU_MEMORY_LIMIT it would give blocks back
        self._outside = cupy.cuda.get_allocator(), cupy.cuda.get_current_stream()
        self._constants: list[tuple[Array, np.ndarray]] = []

    def record(self) -> "Recording[Result]":
        """Calls the function once, which runs nothing. Whatever it raises ends the recording."""
        stream = self._cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be recorded
        with self._cupy.cuda.using_allocator(self._pool.malloc), stream:
            stream.begin_capture()
            try:
                self._result = self._function()
            except BaseException:
                with suppress(Exception):  # of a graph that nobody wants any more
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
        for target, values in self._constants:
            target.set(values)
        self._cupy.cuda.get_current_stream().synchronize()  # a replay may come on any stream
        return self

    def constant(self, values: np.ndarray) -> Array:
        """An array that holds these values in every replay."""
        allocator, stream = self._outside
        with self._cupy.cuda.using_allocator(allocator), stream:
            target = self._cupy.empty(values.shape, values.dtype)
        self._constants.append((target, values))
        return target

    def __call__(self) -> Result:
        """Replays; the result is the same arrays each time, with new contents."""
        self._graph.launch()
        return self._result


def _allocator(cuda: Any) -> Callable[[int], Any]:
    """cudaMalloc for a pool, with an error on which CuPy does not try again. (A method would keep its graph alive.)"""

    def malloc(nbytes: int) -> Any:
        try:
            return cuda.MemoryPointer(cuda.Memory(nbytes), 0)
        except cuda.runtime.CUDARuntimeError as error:
            if error.status != MEMORY_ALLOCATION:
                raise
            raise cuda.memory.OutOfMemoryError(nbytes, -1) from error

    return malloc
