"""A profile and its sums: over ops of one kind, over layers, over the whole."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from segnet_scratch.lab.profile.ceilings import Ceilings
from segnet_scratch.lab.profile.kernels import KernelFigures
from segnet_scratch.lab.profile.record import OpRun, Span


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

    def to_json(self, ceilings: Ceilings | None) -> dict[str, Any]:
        """For programs; what was not measured is None."""
        seconds = self.seconds
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
