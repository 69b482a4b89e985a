"""What the parts of the check have in common: a share of the time, and an outcome."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from segnet_scratch.runtime.devices import Device


@dataclass(frozen=True)
class Work:
    """What a part is given. It stops adding cases when its `seconds` are over."""

    device: Device
    seconds: float
    began: float = field(default_factory=perf_counter)

    @property
    def over(self) -> bool:
        """Is the part's time used up?"""
        return perf_counter() - self.began >= self.seconds

    @property
    def on_gpu(self) -> bool:
        """Else this is the host device, on which the check itself is tried."""
        return self.device.name == "cuda"


@dataclass(frozen=True)
class Outcome:
    """What came of a part: `passed` is None where there was nothing to pass (a timing, a part that cannot run here)."""

    passed: bool | None
    summary: str
    problems: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def judged(summary: str, problems: list[str], **details: Any) -> Outcome:
    """Passed where there are no problems; the first hundred are kept."""
    return Outcome(not problems, f"{summary}, {len(problems)} problems", problems[:100], details)
