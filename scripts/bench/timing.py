"""Times taken in turn, in blocks long enough to count: A B C A B C ..., on the GPU's own clock."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np

BLOCKS = 10  # of each contender
WARM_UP = 20  # calls before anything counts
LATENCIES = 50  # calls, each waited for


class Clock:
    """Takes the time of work that is done when a call returns."""

    def start(self) -> None:
        """Now."""
        self._began = perf_counter()

    def stop(self) -> float:
        """Seconds since `start`, once all that was begun since is done."""
        return perf_counter() - self._began


class CudaClock(Clock):
    """CUDA events on the default stream, where both sides work."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._first.record()

    def stop(self) -> float:
        self._last.record()
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1000


@dataclass(frozen=True)
class Times:
    """Seconds of a call, one number for each block, or for each call where every one was waited for."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(low), float(high)


def in_turn(
    calls: Mapping[str, Callable[[], object]], clock: Clock, seconds: float, warm_up: int = WARM_UP
) -> dict[str, Times]:
    """Blocks of every call, in turn, in about so many seconds; each block is as many calls as fill its share."""
    share = seconds / (BLOCKS * len(calls))
    counts = {}
    for name, call in calls.items():
        clock.start()
        for _ in range(warm_up):
            call()
        counts[name] = max(1, round(share / max(clock.stop() / warm_up, 1e-9)))
    return _taken(calls, clock, counts, BLOCKS)


def _taken(
    calls: Mapping[str, Callable[[], object]], clock: Clock, counts: Mapping[str, int], blocks: int
) -> dict[str, Times]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            clock.start()
            for _ in range(counts[name]):
                call()
            taken[name].append(clock.stop() / counts[name])
    return {name: Times(tuple(times)) for name, times in taken.items()}


def latencies(calls: Mapping[str, Callable[[], object]], clock: Clock) -> dict[str, Times]:
    """Of single calls, each waited for, in turn."""
    return _taken(calls, clock, dict.fromkeys(calls, 1), LATENCIES)
