"""What is written down of each op that runs: counts from its plan, launches, barriers, and times of several passes."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from segnet_scratch.runtime.devices import Timer
from segnet_scratch.runtime.observe import Launch, Listener, Planned, current_scope

RangeOf = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclass
class OpRun:
    """One op at its place in a step."""

    name: str  # "conv2d_forward"
    phase: str  # "forward", "backward" or "update"
    layer: str  # "encoder.1.1"
    flops: int
    bytes: int
    launches: list[Launch] = field(default_factory=list)
    barriers: int = 0  # met by all blocks of all launches together; counted by the host device
    marks: list[tuple[Any, Any]] = field(default_factory=list)  # begin and end in each pass, on the device's clock
    times: list[float] = field(default_factory=list)  # seconds, of each pass

    @property
    def multiply(self) -> str:
        """How its first kernel multiplies: "bf16", "tf32"; or the element type; empty without kernels."""
        return self.launches[0].types.name if self.launches else ""

    @property
    def seconds(self) -> float | None:
        """The median over the passes; None where no time was taken."""
        return median(self.times) if self.times else None


Span = tuple[OpRun, float, float]  # begin and end in seconds from the begin of the first


class Recorder(Listener):
    """Writes down every op of a step. Further passes over the same step add times to the ops of the first one.

    Without a timer it only counts. `before` is called before each op and takes no part in its time: it may empty a
    cache. `range_of` makes a range round each op that other profilers show.
    """

    def __init__(
        self,
        timer: Timer | None = None,
        before: Callable[[], None] = lambda: None,
        range_of: RangeOf = lambda name: contextlib.nullcontext(),
    ) -> None:
        self.runs: list[OpRun] = []
        self._timer, self._before, self._range_of = timer, before, range_of
        self._phase, self._position, self._first_pass = "", 0, True

    def begin_pass(self) -> None:
        """The step starts again from its first op."""
        self._first_pass, self._position = not self.runs, 0

    def enter(self, phase: str) -> None:
        """What follows is "forward", "backward" or "update"."""
        self._phase = phase

    def op(self, op: Planned, run: Callable[[], None]) -> None:
        if self._first_pass:
            self.runs.append(OpRun(op.name, self._phase, current_scope(), op.flops, op.bytes))
        record = self.runs[self._position]
        if (record.name, record.layer) != (op.name, current_scope()):
            raise AssertionError(f"{op.name} of {current_scope()} where the first pass had {record.name}")
        self._before()
        with self._range_of(f"{record.layer} {record.name}"):
            if self._timer is None:
                run()
            else:
                begin = self._timer.mark()
                run()
                record.marks.append((begin, self._timer.mark()))
        self._position += 1

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        if self._first_pass:  # without the arrays, which would stay alive
            self.runs[self._position].launches.append(replace(launch, arguments=()))
        run()

    def barriers(self, count: int) -> None:
        if self._first_pass:
            self.runs[self._position].barriers += count

    def take_times(self) -> None:
        """Turns the marks of all passes into times; waits for the device."""
        for run in self.runs:
            assert self._timer is not None
            run.times = [self._timer.seconds(*marks) for marks in run.marks]

    def spans(self) -> list[Span]:
        """When each op ran in the last pass."""
        timer, start = self._timer, self.runs[0].marks[-1][0]
        assert timer is not None
        ends = [(run, *run.marks[-1]) for run in self.runs]
        return [(run, timer.seconds(start, begin), timer.seconds(start, end)) for run, begin, end in ends]
