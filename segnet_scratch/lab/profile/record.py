"""What is written down of each op that runs, and its sums: over ops of one kind, over layers, over the whole.

Counts come from an op's plan; launches, barriers, and the times of several passes are noted while it runs.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from segnet_scratch.lab.profile.ceilings import Ceilings
from segnet_scratch.lab.profile.kernels import KernelFigures
from segnet_scratch.parallel.communicator import GATHER, SUM, WAIT
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


@dataclass(frozen=True)
class Summary:
    """Several runs of ops, added up."""

    key: str
    runs: tuple[OpRun, ...]

    @property
    def launches(self) -> int:
        """Kernels launched."""
        return sum(len(run.launches) for run in self.runs)

    @property
    def barriers(self) -> int:
        """Barriers met by all blocks together."""
        return sum(run.barriers for run in self.runs)

    @property
    def flops(self) -> int:
        """By the plans."""
        return sum(run.flops for run in self.runs)

    @property
    def bytes(self) -> int:
        """By the plans: the least that must cross the memory bus."""
        return sum(run.bytes for run in self.runs)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def seconds(self) -> float | None:
        """The sum of the medians; None where no time was taken."""
        times = [run.seconds for run in self.runs]
        return None if None in times else sum(time for time in times if time is not None)

    def of_ceiling(self, ceilings: Ceilings | None) -> float | None:
        """The shortest possible time as a share of the time taken, 0 to 1; each op held against its own ceiling.

        Above 1 where an op does less than its definition: Winograd's convolution, or data that stays in a cache.
        """
        if ceilings is None or not self.seconds:
            return None
        return sum(ceilings.seconds(run.flops, run.bytes, run.multiply) for run in self.runs) / self.seconds

    def seconds_of_bytes(self, ceilings: Ceilings | None) -> float | None:
        """What its bytes would take at the rate of a large copy: the prediction for what memory binds."""
        return None if ceilings is None else self.bytes / ceilings.bandwidth

    def to_json(self, ceilings: Ceilings | None) -> dict[str, Any]:
        """For programs; what was not measured is None."""
        seconds, of_bytes = self.seconds, self.seconds_of_bytes(ceilings)
        return {
            "name": self.key,
            "runs": len(self.runs),
            "launches": self.launches,
            "barriers": self.barriers,
            "flops": self.flops,
            "bytes": self.bytes,
            "intensity": self.intensity,
            "seconds": seconds,
            "gflops_per_second": self.flops / seconds / 1e9 if seconds else None,
            "gbytes_per_second": self.bytes / seconds / 1e9 if seconds else None,
            "seconds_of_bytes": of_bytes,
            "of_copy": of_bytes / seconds if seconds and of_bytes is not None else None,
            "of_ceiling": self.of_ceiling(ceilings),
        }


@dataclass
class Profile:
    """Everything that was found out about some ops."""

    title: str
    device: str
    runs: list[OpRun]
    ceilings: Ceilings | None = None
    kernels: list[KernelFigures] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    parameters: int = 0  # of the network
    memory: dict[str, int] = field(default_factory=dict)  # bytes, of a step that was counted
    spans: list[Span] = field(default_factory=list)  # of one pass, for a time line

    def by(self, key: Callable[[OpRun], str]) -> list[Summary]:
        """Sums by a key of the runs, in order of first appearance."""
        groups: dict[str, list[OpRun]] = {}
        for run in self.runs:
            groups.setdefault(key(run), []).append(run)
        return [Summary(name, tuple(runs)) for name, runs in groups.items()]

    @property
    def total(self) -> Summary:
        """Over everything."""
        return Summary("total", tuple(self.runs))

    @property
    def communication(self) -> dict[str, float]:
        """Of several ranks: seconds of a step in which arrays went between them, and in which computing waited for it.

        A GPU sums gradients beside what it computes: what it waits for at the end, and for statistics of batch norm, is
        exposed. A CPU does one after the other.
        """
        seconds = dict.fromkeys((SUM, GATHER, WAIT), 0.0)
        for run in self.runs:
            if run.name in seconds:
                seconds[run.name] += run.seconds or 0.0
        beside = 0.0 if self.device in ("numpy", "host") else seconds[SUM]
        return {"seconds": seconds[SUM] + seconds[GATHER], "exposed": sum(seconds.values()) - beside}

    def to_json(self) -> dict[str, Any]:
        """For programs: totals, sums by op, layer and phase, every run, kernels."""
        ceilings = self.ceilings

        def sums(summaries: Iterable[Summary]) -> list[dict[str, Any]]:
            return [summary.to_json(ceilings) for summary in summaries]

        return {
            "title": self.title,
            "device": self.device,
            "messages": self.messages,
            "parameters": self.parameters,
            "memory": self.memory,
            "communication": self.communication,
            "ceilings": None
            if ceilings is None
            else {
                "flops_per_second": ceilings.flops,
                "tensor_core_flops_per_second": dict(ceilings.tensor_cores),
                "bytes_per_second": ceilings.bandwidth,
                "source": ceilings.source,
            },
            "total": self.total.to_json(ceilings),
            "phases": sums(self.by(lambda run: run.phase)),
            "ops": sums(self.by(lambda run: run.name)),
            "layers": sums(self.by(lambda run: run.layer)),
            "runs": [
                {
                    **Summary(run.name, (run,)).to_json(ceilings),
                    "phase": run.phase,
                    "layer": run.layer,
                    "times": run.times,
                    "kernels": [{"kernel": x.kernel.name, "grid": x.grid, "block": x.block} for x in run.launches],
                }
                for run in self.runs
            ],
            "kernels": [figures.to_json() for figures in self.kernels],
        }
