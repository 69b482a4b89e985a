"""Time on a device's own clock, for profilers and benchmarks."""

from time import perf_counter
from typing import Any


class Timer:
    """Marks in the sequence of a device's work, and the time between two of them. This one is the CPU's."""

    def mark(self) -> Any:
        """A moment: when all work given to the device so far is done."""
        return perf_counter()

    def seconds(self, first: Any, last: Any) -> float:
        """The time from one mark to a later one; waits until the device has reached it."""
        return last - first

    def has_reached(self, mark: Any) -> bool:
        """Has a device that works by itself got to a mark already? A CPU works when it is told, and never waits."""
        return False


class EventTimer(Timer):
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

    def has_reached(self, mark: Any) -> bool:
        return bool(mark.done)
