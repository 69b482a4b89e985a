"""The time that a device takes for some work, without the time that the CPU takes to send it there."""

from collections.abc import Callable
from typing import Any, NamedTuple

from segnet_scratch.runtime.devices import Timer

MOST_COVERS = 64


class Lap(NamedTuple):
    """Marks on the device's clock round some work; `waited`: in between, the device waited for the CPU."""

    begin: Any
    end: Any
    waited: bool


class Stopwatch:
    """Marks work, each piece behind a `cover`: device's work that takes no part in its time, and may empty a cache.

    A GPU works off what the CPU gives it. Where it gets to the first mark before the CPU has sent the work, the time
    between the marks is the CPU's. So the cover is laid as often as it takes for that not to happen.
    """

    def __init__(self, timer: Timer, cover: Callable[[], object] | None = None) -> None:
        self.timer, self._cover, self._covers = timer, cover or (lambda: None), 1

    def lap(self, work: Callable[[], object]) -> Lap:
        """Does the work between two marks."""
        for _ in range(self._covers):
            self._cover()
        begin = self.timer.mark()
        work()
        waited = self.timer.has_reached(begin)
        if waited:
            self._covers = min(2 * self._covers, MOST_COVERS)
        return Lap(begin, self.timer.mark(), waited)

    def seconds(self, laps: list[Lap]) -> list[float]:
        """Of the laps in which the device did not wait; of all, where it did in each. Waits for the device."""
        return [self.timer.seconds(lap.begin, lap.end) for lap in [x for x in laps if not x.waited] or laps]
