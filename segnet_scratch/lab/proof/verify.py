"""Runs the proof on this machine: behind `segnet verify`. What it consists of is in lab/proof/parts."""

import datetime
import itertools
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from typing import Any

import numpy as np

from segnet_scratch import __version__
from segnet_scratch.errors import ConfigError, DeviceError
from segnet_scratch.lab.proof.launches import rows_on
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.parts.base import Part, kernels_on, reason_against
from segnet_scratch.lab.proof.parts.compilation import CudaBuilds, HostBuilds
from segnet_scratch.lab.proof.processes import do_all
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import FULL, QUICK, Effort, Failure, Tally, Work
from segnet_scratch.ops.cases import Row
from segnet_scratch.ops.convolution.conv2d_hopper_cases import HopperRow
from segnet_scratch.runtime.devices import cuda_missing, cupy_facts, get_device
from segnet_scratch.runtime.host import compiler_name, find_compiler

DEVICES = ("host", "numpy", "cuda")
ANY = "any"  # stands for the device of parts that need none
# Seconds for a piece of work on a GPU, whose process then is ended; less where a hang is to be feared.
LONG_LIMIT, GPU_LIMIT, RISKY_LIMIT = 300.0, 90.0, 30.0
BUILD_LIMIT = 90.0  # more where kernels are compiled when they are first launched, since "cuda builds" is left out
HOPPER = {row.name for row in ROWS if isinstance(row, HopperRow)}
FAILURES_SHOWN, NAMES_SHOWN = 20, 4


@dataclass(frozen=True)
class Line:
    """A part on a device: what it came to, and what it has not got to."""

    part: Part
    device: str
    tally: Tally
    left: dict[Work, str] = field(default_factory=dict)  # not done, and why; "" where there was no time for it yet
    planned: Counter[str] = field(default_factory=Counter)  # cases, fixed and random

    @property
    def verdict(self) -> str:
        """In a word. Random cases may be left out, and nothing else."""
        if self.tally.failures:
            return "FAILED"
        if self.tally.counts:
            return "passed" if self.whole else "incomplete"
        return "skipped" if self.whole else "not reached"

    @property
    def whole(self) -> bool:
        """Has every fixed case been run?"""
        return all(work.kind == "random" for work in self.left)

    @property
    def left_out(self) -> dict[str, Counter[str]]:
        """Cases of each target for which there was no time, fixed and random ones."""
        found: dict[str, Counter[str]] = {kind: Counter() for kind in self.planned}
        for work, reason in self.left.items():
            if not reason:
                found[work.kind][work.target] += work.count
        return {kind: cases for kind, cases in found.items() if cases}

    @property
    def ran(self) -> str:
        """What has been run, in figures; "" for nothing."""
        return self.part.ran(self.tally) if self.tally.counts else ""

    @property
    def remark(self) -> str:
        """Why not all of it has been run."""
        if self.verdict == "not reached" and not any(self.left.values()):
            return "time was over before it began"
        remarks = [self.tally.skipped]
        if reasons := sorted({reason for reason in self.left.values() if reason}):
            remarks.append(f"left out: {', '.join(reasons)}")
        for kind, cases in self.left_out.items():
            names = [*cases][:NAMES_SHOWN] + [f"{len(cases) - NAMES_SHOWN} more"] * (len(cases) > NAMES_SHOWN)
            of = f": {', '.join(names)}" if kind == "fixed" else ""
            remarks.append(f"no time for {cases.total():,} of {self.planned[kind]:,} {kind} cases{of}")
        return "; ".join(filter(None, remarks))

    def to_json(self) -> dict[str, Any]:
        """For programs to read."""
        head = {"part": self.part.name, "proves": self.part.proves, "device": self.device, "verdict": self.verdict}
        worst = self.tally.worst if isfinite(self.tally.worst) else None  # JSON has no infinity
        ran = {"ran": self.ran, "planned": self.planned, "left_out": self.left_out}
        return {**head, **ran, **self.tally.to_json(), "skipped": self.remark, "worst": worst}


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

    def named(self, *verdicts: str) -> list[str]:
        """The parts of these verdicts."""
        return list(dict.fromkeys(line.part.name for line in self.lines if line.verdict in verdicts))

    @property
    def passed(self) -> bool:
        """Has something been shown, and does all of it hold?"""
        return not self.named("FAILED", "incomplete", "not reached") and bool(self.named("passed"))

    def to_json(self) -> dict[str, Any]:
        """For programs to read, and for whoever gets the report."""
        fields = {name: value for name, value in vars(self).items() if name != "lines"}
        parts = [line.to_json() for line in self.lines]
        return {"passed": self.passed, **fields, "effort": asdict(self.effort), "parts": parts}

    def text(self) -> Iterator[tuple[str, str]]:
        """A line for each part, then the failures: each a verdict, or "", and the text."""
        wide = max([len(line.part.name) for line in self.lines], default=0)
        for line in self.lines:
            ran = line.ran or f"{line.part.proves}: not run"
            yield line.verdict, f"{line.part.name:{wide}} {line.device:5} {line.verdict:11} {ran}"
            if line.remark:
                yield "skipped", f"{'':{wide}} {line.remark}"
        for name, reason in self.missing.items():
            yield "skipped", f"{name}: {reason}"
        for failure in self.failures[:FAILURES_SHOWN]:
            yield "FAILED", str(failure)
        if len(self.failures) > FAILURES_SHOWN:
            yield "FAILED", f"... {len(self.failures) - FAILURES_SHOWN} more failures: --json FILE has all of them"
        if left := self.named("incomplete", "not reached"):
            yield "FAILED", f"not shown, since not all of it was run: {', '.join(left)}"
        where = f"on {self.environment['devices']}, seed {self.seed}, {self.seconds:.0f} s"
        if self.passed:
            held = sum(line.verdict == "passed" for line in self.lines)
            yield "passed", f"everything holds: {held} parts {where}"
        elif self.failures:
            yield "FAILED", f"FAILED: {', '.join(self.named('FAILED'))}, {where}"
        else:
            yield "FAILED", f"{'nothing that was run has failed' if left else 'nothing has been run'}, {where}"


def verify(
    devices: Sequence[str] | None = None,
    effort: Effort = QUICK,
    seed: int = 0,
    parts: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    order: str = "ascending",
    sanitize: bool = False,
    minutes: float = inf,
    keep: Callable[[Report], None] = lambda report: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Proves these parts (all) of these rows of the op table (all) on these devices (all that there are).

    `order` and `sanitize` are those of the host device (see HostOptions). No piece of work begins after so many
    `minutes`, which a GPU fills with random cases. `keep` gets the report as it stands when a round of a part is done:
    a machine may be taken away. `progress` is told how many pieces of work are done of how many. ConfigError for names
    that are unknown; DeviceError where a device that was asked for is missing.
    """
    start = time.monotonic()
    chosen = [PARTS[name] for name in dict.fromkeys(parts or PARTS) if _known("part", name, PARTS)]
    table: tuple[Row, ...] = tuple(map(row_named, dict.fromkeys(rows))) if rows else ROWS
    present, missing = _present(devices)
    lines: dict[tuple[str, str], Line] = {}
    works: list[Work] = []
    # A machine with a GPU is not rented to compile for others.
    anywhere = [ANY] if parts or present != ["cuda"] else []
    deep = {name: getattr(FULL if isfinite(minutes) else effort, name) for name in ("shapes", "doubles", "integers")}
    unable = set(table) - set(rows_on(get_device("cuda"), table)) if "cuda" in present else set[Row]()
    without = {("cuda", row.name) for row in unable}  # the instructions
    built = any(isinstance(part, CudaBuilds) for part in chosen)
    for part, device in itertools.product(chosen, (*present, *anywhere)):
        other = device not in part.devices
        if other and (not parts or ANY in (device, *part.devices)):
            continue
        reason = f"it is for {' and '.join(part.devices)}, not for {device}" if other else part.unavailable()
        lines[part.name, device] = Line(part, device, Tally(skipped=reason))
        amount = replace(effort, **deep) if device == "cuda" else effort
        for work in () if reason else part.works(device, amount, seed, table):
            if work.device == "cuda":
                limit = RISKY_LIMIT if _is_risky(work) else LONG_LIMIT if part.long else GPU_LIMIT
                limit += 0 if built else BUILD_LIMIT
                work = replace(work, limit=limit, alone=part.measures)
            elif work.device == "host":
                work = replace(work, order=order, sanitize=sanitize or part.sanitized)
            line = lines.setdefault((part.name, work.device), Line(part, work.device, Tally()))
            # A host build is for several devices.
            if work not in line.left and (work.device, work.target) not in without:
                line.left[work] = ""
                line.planned[work.kind] += work.count
                works.append(work)
    finished, all_fixed = 0, sum(work.kind == "fixed" for work in works)

    def report() -> Report:
        shown = [x for x in lines.values() if x.tally.counts or x.tally.failures or x.remark]
        return Report(shown, missing, effort, seed, _environment(present), time.monotonic() - start)

    def done(work: Work, tally: Tally) -> None:
        nonlocal finished
        finished += 1
        line = lines[work.part, work.device]
        del line.left[work]
        line.tally.add(tally)
        if tally.ended and work.device == "cuda" and any(row.name == work.target for row in table):
            for other in lines.values():  # on this row no other process is to be lost
                same = [left for left in other.left if (left.device, left.target) == ("cuda", work.target)]
                other.left.update(dict.fromkeys(same, f"{work.target}, which {tally.ended} in {work.part}"))
        if tally.failures or all(left.round != work.round for left in line.left):
            keep(report())
        progress(finished, max(finished, all_fixed))

    # What is built first needs not be built by two processes at once, and what hangs must not be met by others.
    stages: list[list[Work]] = [[], [], []]
    for work in sorted(works, key=_turn):
        builds = isinstance(PARTS[work.part], HostBuilds | CudaBuilds)
        stages[0 if builds else 1 if _is_risky(work) and work.round == 0 else 2].append(work)
    for stage, batch in enumerate(stages):
        if stage == 2 and any(lines[work.part, "cuda"].tally.failures for work in stages[1]):
            os.environ["SEGNET_HOPPER"] = "0"  # the engine does without what has failed
        do_all(batch, done, lambda work: not lines[work.part, work.device].left[work], until=start + 60 * minutes)
    if table is ROWS and "reference" in (part.name for part in chosen):
        _expect_every_kernel(lines)
    keep(report())
    return report()


def _is_risky(work: Work) -> bool:
    """Hopper's kernels on a GPU: what is wrong with a barrier, a byte count or a descriptor there hangs."""
    return work.device == "cuda" and work.target in HOPPER


def _turn(work: Work) -> tuple[float, ...]:
    """What goes first: a round of everything, before there is more of anything; where many share it what takes long."""
    if work.device == "cuda":
        return work.round, list(PARTS).index(work.part)
    return work.round, not PARTS[work.part].long


def _known(what: str, name: str, known: Any) -> bool:
    if name not in known:
        raise ConfigError(f"verify: there is no {what} {name!r}; expected one of {', '.join(known)}")
    return True


def _present(devices: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The devices to run on, and why others are missing; one that was asked for must be there."""
    missing = {}
    for device in devices or DEVICES:
        _known("device", device, DEVICES)
        reason = cuda_missing() if device == "cuda" else reason_against(find_compiler) if device == "host" else None
        if reason:
            missing[device] = reason
    if missing and devices:
        raise DeviceError(next(iter(missing.values())))
    return [device for device in dict.fromkeys(devices or DEVICES) if device not in missing], missing


def _expect_every_kernel(lines: dict[tuple[str, str], Line]) -> None:
    """A shipped kernel that a device could run and no row launches is a failure."""
    for (name, device), line in lines.items():
        if name == "reference" and device != "numpy" and line.tally.counts and line.whole:
            for kernel in sorted(kernels_on(get_device(device)) - line.tally.kernels.keys()):
                message = "no row of the op table (lab/proof/table.py) launches this kernel"
                line.tally.fail(Work(name, device, kernel), "any", message)


def _environment(devices: Sequence[str]) -> dict[str, str]:
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    facts = {"version": __version__, "date": date, "system": system, "python": platform.python_version()}
    facts |= {"numpy": np.__version__, "devices": ", ".join(devices)}
    if "host" in devices:
        facts["compiler"] = compiler_name()
    if "cuda" in devices:
        cupy, gpu = cupy_facts(), str(get_device("cuda").gpu)
        facts |= {"gpu": gpu, "cupy": cupy["version"], "driver": str(cupy["driver"]), "runtime": str(cupy["runtime"])}
        if setting := os.environ.get("SEGNET_HOPPER"):  # at 0 the engine does without Hopper's kernels
            facts["SEGNET_HOPPER"] = setting
    return facts
