"""Runs the proof on this machine: behind `segnet verify`. What it consists of is in lab/proof/parts."""

import datetime
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

from segnet_scratch import __version__
from segnet_scratch.errors import CompileError, ConfigError, DeviceError
from segnet_scratch.lab.proof.launches import device_has, rows_on
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.parts.base import Part
from segnet_scratch.lab.proof.parts.compilation import HostBuilds
from segnet_scratch.lab.proof.processes import do_all
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import QUICK, Effort, Failure, Tally, Work
from segnet_scratch.ops.cases import Row
from segnet_scratch.runtime.devices import cuda_missing, get_device
from segnet_scratch.runtime.host import compiler_name, find_compiler
from segnet_scratch.runtime.launch import shipped_kernels

DEVICES = ("host", "numpy", "cuda")
ANY = "any"  # stands for the device of parts that need none


@dataclass(frozen=True)
class Line:
    """A part on a device, and what it came to."""

    part: Part
    device: str
    tally: Tally

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.tally.failures:
            return "FAILED"
        return "passed" if self.tally.counts else "skipped"

    def to_json(self) -> dict[str, Any]:
        """For programs to read."""
        return {
            "part": self.part.name,
            "proves": self.part.proves,
            "device": self.device,
            "verdict": self.verdict,
            "ran": self.part.ran(self.tally),
            **self.tally.to_json(),
            "worst": self.tally.worst if isfinite(self.tally.worst) else None,  # JSON has no infinity
        }


@dataclass(frozen=True)
class Report:
    """What ran on this machine, and what failed."""

    lines: list[Line]
    missing: dict[str, str]  # devices that are not there, and why
    effort: Effort
    seed: int
    environment: dict[str, str]
    seconds: float

    @property
    def failures(self) -> list[Failure]:
        """Everything that does not hold."""
        return [failure for line in self.lines for failure in line.tally.failures]

    @property
    def passed(self) -> bool:
        """Has something been shown, and does all of it hold?"""
        return not self.failures and any(line.verdict == "passed" for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """For programs to read, and for whoever gets the report."""
        return {
            "passed": self.passed,
            "seconds": self.seconds,
            "seed": self.seed,
            "environment": self.environment,
            "missing": self.missing,
            "effort": asdict(self.effort),
            "parts": [line.to_json() for line in self.lines],
        }


def verify(
    devices: Sequence[str] | None = None,
    effort: Effort = QUICK,
    seed: int = 0,
    parts: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    order: str = "ascending",
    sanitize: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Proves these parts (all) of these rows of the op table (all) on these devices (all that there are).

    `order` and `sanitize` are those of the host device (see HostOptions). `progress` is told how many pieces of work
    are done of how many. ConfigError for names that are unknown; DeviceError or CompileError where a device that was
    asked for is missing.
    """
    start = time.perf_counter()
    chosen = [PARTS[name] for name in parts or PARTS if _known("part", name, PARTS)]
    table: tuple[Row, ...] = tuple(map(row_named, rows)) if rows else ROWS
    present, missing = _present(devices)
    lines: dict[tuple[str, str], Line] = {}
    works: list[Work] = []
    tables = {ANY: table} | {device: rows_on(get_device(device), table) for device in present}
    for part in chosen:
        for device in (*present, ANY):
            if device not in part.devices:
                continue
            reason = part.unavailable()
            lines[part.name, device] = Line(part, device, Tally(skipped=reason))
            if not reason:
                works += part.works(device, effort, seed, tables[device])
    works = [_on_host(work, order, sanitize or PARTS[work.part].sanitized) for work in works]
    works.sort(key=lambda work: not PARTS[work.part].long)
    finished = 0

    def done(work: Work, tally: Tally) -> None:
        nonlocal finished
        finished += 1
        lines[work.part, work.device].tally.add(tally)
        progress(finished, len(works))

    for first in (True, False):  # what is built first needs not be built by two processes at once
        batch = [work for work in works if (work.part == HostBuilds.name) == first]
        do_all(batch, lambda work: work.sanitize, done)
    if table is ROWS and "reference" in (part.name for part in chosen):
        _expect_every_kernel(lines)
    seconds = time.perf_counter() - start
    shown = [line for line in lines.values() if line.tally.counts or line.tally.failures or line.tally.skipped]
    return Report(shown, missing, effort, seed, _environment(present), seconds)


def _on_host(work: Work, order: str, sanitize: bool) -> Work:
    return replace(work, order=order, sanitize=sanitize) if work.device == "host" else work


def _known(what: str, name: str, known: Any) -> bool:
    if name not in known:
        raise ConfigError(f"verify: there is no {what} {name!r}; expected one of {', '.join(known)}")
    return True


def _present(devices: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The devices to run on, and why others are missing; one that was asked for must be there."""
    present, missing = [], {}
    for device in devices or DEVICES:
        _known("device", device, DEVICES)
        reason = cuda_missing() if device == "cuda" else None
        try:
            if device == "host":
                find_compiler()
        except CompileError as error:
            if devices:
                raise
            reason = str(error)
        if reason and devices:
            raise DeviceError(reason)
        if reason:
            missing[device] = reason
        else:
            present.append(device)
    return present, missing


def _expect_every_kernel(lines: dict[tuple[str, str], Line]) -> None:
    """A shipped kernel that a device could run and no row launches is a failure."""
    for (name, device), line in lines.items():
        if name == "reference" and device != "numpy" and line.tally.counts:
            work = Work(name, device, "op table")
            able = {kernel for kernel in shipped_kernels() if device_has(get_device(device), kernel)}
            for kernel in sorted(able - line.tally.kernels.keys()):
                line.tally.fail(work, kernel, "any", "no row of the op table (lab/proof/table.py) launches this kernel")


def _environment(devices: Sequence[str]) -> dict[str, str]:
    facts = {
        "version": __version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "devices": ", ".join(devices),
    }
    return facts | ({"compiler": compiler_name()} if "host" in devices else {})
