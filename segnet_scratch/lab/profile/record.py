"""What is written down of each op that runs, and its sums: over ops of one kind, over layers, over the whole.

Counts come from an op's plan; launches, barriers, and the times of several passes are noted while it runs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from segnet_scratch.lab.profile.ceilings import Ceilings
from segnet_scratch.lab.profile.stopwatch import Lap, Stopwatch
from segnet_scratch.parallel.communicator import GATHER, SUM, WAIT
from segnet_scratch.runtime.observe import Launch, Observer, Work, current_scope


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
    laps: list[Lap] = field(default_factory=list)  # in each pass, on the device's clock
    times: list[float] = field(default_factory=list)  # seconds, of each pass that counts

    @property
    def multiply(self) -> str:
        """How its first kernel multiplies: "bf16", "tf32"; or the element type; empty without kernels."""
        return self.launches[0].types.name if self.launches else ""

    @property
    def seconds(self) -> float | None:
        """The median over the passes; None where no time was taken."""
        return median(self.times) if self.times else None


Span = tuple[OpRun, float, float]  # begin and end in seconds from the begin of the first


class Recorder(Observer):
    """Writes down every op of a step. Further passes over the same step add times to the ops of the first one.

    Without a stopwatch it only counts. `range_of` makes a range round each op that other profilers show.
    """

    def __init__(
        self, watch: Stopwatch | None = None, range_of: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.runs: list[OpRun] = []
        self._watch, self._range_of = watch, range_of
        self._phase, self._position, self._first_pass = "", 0, True

    def begin_pass(self) -> None:
        """The step starts again from its first op."""
        self._first_pass, self._position = not self.runs, 0

    def enter(self, phase: str) -> None:
        """What follows is "forward", "backward" or "update"."""
        self._phase = phase

    def op(self, op: Work, run: Callable[[], None]) -> None:
        if self._first_pass:
            self.runs.append(OpRun(op.name, self._phase, current_scope(), op.flops, op.bytes))
        record = self.runs[self._position]
        if (record.name, record.layer) != (op.name, current_scope()):
            raise AssertionError(f"{op.name} of {current_scope()} where the first pass had {record.name}")
        with self._range_of(f"{record.layer} {record.name}"):
            if self._watch is None:
                run()
            else:
                record.laps.append(self._watch.lap(run))
        self._position += 1

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        if self._first_pass:  # without the arrays, which would stay alive
            self.runs[self._position].launches.append(replace(launch, arguments=()))
        run()

    def barriers(self, count: int) -> None:
        if self._first_pass:
            self.runs[self._position].barriers += count

    def take_times(self) -> None:
        """Turns the laps of all passes into times; waits for the device."""
        for run in self.runs:
            run.times = self._watch.seconds(run.laps) if self._watch else []

    def spans(self) -> list[Span]:
        """When each op ran in the last pass; nothing without a stopwatch."""
        if self._watch is None:
            return []
        seconds, start, laps = self._watch.timer.seconds, self.runs[0].laps[-1].begin, [r.laps[-1] for r in self.runs]
        return [(r, seconds(start, x.begin), seconds(start, x.end)) for r, x in zip(self.runs, laps, strict=True)]


class Summary:
    """Several runs of ops, added up, by the figures that programs and tables are shown; None what was not measured."""

    def __init__(self, key: str, runs: Sequence[OpRun], ceilings: Ceilings | None = None) -> None:
        self.key, self.runs = key, runs
        self.launches = sum(len(run.launches) for run in runs)
        self.barriers = sum(run.barriers for run in runs)  # met by all blocks together
        # By the plans; the bytes are the least that must cross the memory bus.
        self.flops, self.bytes = sum(run.flops for run in runs), sum(run.bytes for run in runs)
        self.intensity = self.flops / self.bytes if self.bytes else 0.0
        medians = [run.seconds for run in runs if run.seconds is not None]
        self.seconds = sum(medians) if len(medians) == len(runs) else None
        self.gflops_per_second, self.gbytes_per_second = self._per_second(self.flops / 1e9, self.bytes / 1e9)
        # The time of its bytes at the rate of a large copy is the prediction for a memory-bound op. Each op has its own
        # ceiling; what lies above it does less than its definition (Winograd) or reads from a cache.
        self.seconds_of_bytes = self.bytes / ceilings.bandwidth if ceilings else None
        least = sum(ceilings.seconds(r.flops, r.bytes, r.multiply) for r in runs) if ceilings else None
        self.of_copy, self.of_ceiling = self._per_second(self.seconds_of_bytes, least)

    def _per_second(self, *amounts: float | None) -> list[float | None]:
        return [amount / self.seconds if self.seconds and amount is not None else None for amount in amounts]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        figures = {name: value for name, value in vars(self).items() if name != "key"}
        return {"name": self.key, **figures, "runs": len(self.runs)}


@dataclass
class Profile:
    """Everything that was found out about some ops."""

    title: str
    device: str
    runs: list[OpRun]
    ceilings: Ceilings | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)  # see kernels.py
    messages: list[str] = field(default_factory=list)
    parameters: int = 0  # of the network
    memory: dict[str, int] = field(default_factory=dict)  # bytes, of a step that was counted
    spans: list[Span] = field(default_factory=list)  # of one pass, for a time line

    def by(self, key: Callable[[OpRun], str]) -> list[Summary]:
        """Sums by a key of the runs, in order of first appearance."""
        groups: dict[str, list[OpRun]] = {}
        for run in self.runs:
            groups.setdefault(key(run), []).append(run)
        return [Summary(name, runs, self.ceilings) for name, runs in groups.items()]

    def each(self, key: Callable[[OpRun], str] = lambda run: run.name) -> list[Summary]:
        """Every run by itself."""
        return [Summary(key(run), [run], self.ceilings) for run in self.runs]

    @property
    def total(self) -> Summary:
        """Over everything."""
        return Summary("total", self.runs, self.ceilings)

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
        sums = {"phases": lambda run: run.phase, "ops": lambda run: run.name, "layers": lambda run: run.layer}
        runs = []
        for run, summary in zip(self.runs, self.each(), strict=True):
            launched = [{"kernel": x.kernel.name, "grid": x.grid, "block": x.block} for x in run.launches]
            place = {"phase": run.phase, "layer": run.layer, "times": run.times, "kernels": launched}
            runs.append(summary.to_json() | place)
        return {
            **{name: value for name, value in vars(self).items() if name != "spans"},
            "communication": self.communication,
            "ceilings": self.ceilings and self.ceilings.to_json(),
            "total": self.total.to_json(),
            **{name: [summary.to_json() for summary in self.by(key)] for name, key in sums.items()},
            "runs": runs,
        }
