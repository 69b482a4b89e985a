"""What a part of the proof is, and what those that go over the op table share."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from segnet_scratch.errors import SegnetError
from segnet_scratch.lab.proof.compare import Defect
from segnet_scratch.lab.proof.launches import Replay, device_has, kernels_of, noting_launches
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import RANDOM, Effort, Tally, Work
from segnet_scratch.ops.cases import Case, Inputs, Row
from segnet_scratch.ops.convolution.conv2d_hopper import tiles_on
from segnet_scratch.ops.convolution.conv2d_hopper_cases import HopperRow
from segnet_scratch.ops.op import Op
from segnet_scratch.runtime.devices import Device, HostDevice, get_device
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.launch import shipped_kernels

CASES_AT_ONCE = 40  # of a row, in one piece of work
CASES_AT_ONCE_ON_GPU = 10  # few: what hangs there is ended after seconds
FIRST_CASES_ON_GPU = 3  # of each row, before there are more of any
CASE_MARK = "segnet-case: "  # begins the line on stderr that tells which case comes next
ENOUGH = 5  # failures after which the rest of a piece of work is left out

Rows = tuple[Row, ...]  # of the op table


class Part:
    """One property that is proven. Subclasses say what work there is, and what is wrong with what it comes to."""

    name: ClassVar[str]
    proves: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("numpy", "host", "cuda")
    sanitized: ClassVar[bool] = False  # its work needs a process under AddressSanitizer
    long: ClassVar[bool] = False  # its pieces of work take long, and are begun first; on a GPU they may take longer
    measures: ClassVar[bool] = False  # how long something takes on a GPU, which then does nothing else

    def unavailable(self) -> str:
        """Why it cannot run on this machine, with the fix; "" where it can."""
        return ""

    def targets(self, rows: Rows) -> Sequence[str]:
        """What each piece of work is about; one, where it is about the rows together."""
        return ["SegNet"] if rows is ROWS else []

    def works(self, device: str, effort: Effort, seed: int, rows: Rows = ROWS) -> Iterable[Work]:
        """The pieces of work on a device, each apart from the others."""
        return [Work(self.name, device, target, seed=seed, effort=effort) for target in self.targets(rows)]

    def do(self, work: Work) -> Tally:
        """Does one of them."""
        return self.prove(work, device_of(work))

    def prove(self, work: Work, device: Device) -> Tally:
        """Does it on a device, which may be one with a fault."""
        tally = Tally()
        with np.errstate(all="ignore"), tally.attempt(work, work.cases):
            for problem in self.problems(work, device, tally):
                tally.fail(work, work.cases, problem)
        return tally

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[object]:
        """What is wrong; what was run and measured goes to the tally."""
        raise NotImplementedError

    def ran(self, tally: Tally) -> str:
        """What has been run, in figures, and what was measured."""
        return ", ".join([*(f"{count:,} {what}" for what, count in tally.counts.items()), *tally.notes])


@dataclass(frozen=True)
class CaseRun:
    """One case of a row, being proven: where its results and failures go."""

    row: Row
    case: Case
    index: int
    work: Work
    device: Device
    tally: Tally

    @property
    def where(self) -> str:
        """Names the case, so that it can be run again."""
        return f"{self.case}, case {self.index} of seed {self.work.seed}"

    def op_and_inputs(self) -> tuple[Op, Inputs]:
        """The op planned for the row's first element type, and its inputs."""
        op = self.row.plan(self.case, self.row.elements[0])
        return op, self.row.inputs(op, self.case, self.row.generator(self.work.seed, self.index))

    def fail(self, how: str, message: str) -> None:
        """Notes a failure."""
        self.tally.fail(self.work, f"{how}, {self.where}" if how else self.where, message)

    def attempt(self, how: str = "") -> AbstractContextManager[None]:
        """An error of the project's own inside is a failure."""
        return self.tally.attempt(self.work, f"{how}, {self.where}" if how else self.where)


class RowPart(Part):
    """A part that goes over cases of the rows of the op table: the fixed ones, then random ones."""

    random: ClassVar[str] = ""  # the figure of Effort that says how many random cases; none without

    def takes(self, row: Row) -> bool:
        """Is this a row for this part?"""
        return True

    def targets(self, rows: Rows) -> Sequence[str]:
        return [row.name for row in rows if self.takes(row)]

    def works(self, device: str, effort: Effort, seed: int, rows: Rows = ROWS) -> Iterator[Work]:
        for row in map(row_named, self.targets(rows)):
            fixed = len(row.cases())
            few, at_once = (FIRST_CASES_ON_GPU, CASES_AT_ONCE_ON_GPU) if device == "cuda" else (fixed, CASES_AT_ONCE)
            count = fixed + (getattr(effort, self.random) if self.random else 0)
            starts = {*range(0, few, at_once), *range(few, fixed, at_once), *range(fixed, count, at_once)}
            for first, end in pairwise([*sorted(starts), count]):
                turn = int(first >= few) if first < fixed else RANDOM + (first - fixed) // at_once
                yield Work(self.name, device, row.name, first, end - first, seed, effort, round=turn)

    def runs(self, work: Work, device: Device, tally: Tally) -> Iterator[CaseRun]:
        """The cases that the work names."""
        row = row_named(work.target)
        for index in range(work.first, work.first + work.count):
            yield CaseRun(row, case_of(row, index, work.seed), index, work, device, tally)

    def prove(self, work: Work, device: Device) -> Tally:
        tally = Tally()
        tally.counts["rows"] += work.first == 0
        with np.errstate(all="ignore"):  # what a fault makes of numbers is found by comparison
            for run in self.runs(work, device, tally):
                if work.sanitize or work.device == "cuda":
                    os.write(2, f"{CASE_MARK}{run.where}\n".encode())
                with run.attempt(), noting_launches() as launched:
                    tally.counts["shapes"] += 1
                    self.prove_case(run)
                tally.kernels.update(set(launched))
                if len(tally.failures) >= ENOUGH:
                    break
        return tally

    def prove_case(self, run: CaseRun) -> None:
        """Proves one case; failures go to its tally."""
        raise NotImplementedError

    def ran(self, tally: Tally) -> str:
        fewest = min(tally.kernels.values(), default=0)
        kernels = f", {len(tally.kernels)} kernels with at least {fewest} shapes each"
        return super().ran(tally) + (kernels if fewest else "")


def kernels_on(device: Device) -> set[str]:
    """The shipped kernels that a device can run; Hopper's not where they are forbidden."""
    forbidden = device.architecture is not None and tiles_on(device) is None
    left_out = {kernel for row in ROWS if forbidden and isinstance(row, HopperRow) for kernel in kernels_of(row)}
    return {kernel for kernel in shipped_kernels() if device_has(device, kernel)} - left_out


def case_of(row: Row, index: int, seed: int) -> Case:
    """The case of this number: the fixed ones of the row first, then random ones."""
    fixed = row.cases()
    return fixed[index] if index < len(fixed) else row.random_case(row.generator(seed, index, 1))


def reason_against(attempt: Callable[[], object]) -> str:
    """The message of the project's error that an attempt meets; "" where it meets none."""
    try:
        attempt()
    except SegnetError as error:
        return str(error)
    return ""


def device_of(work: Work) -> Device:
    """The device that a work is to be done on.

    The host device has one worker: pieces of work share the cores already, and one order of blocks is one order.
    """
    if work.device != "host":
        return get_device("numpy" if work.device == "any" else work.device)
    return HostDevice(HostOptions(work.order, work.seed, workers=1, sanitize=work.sanitize))


def blame(run: CaseRun, op: Op, inputs: Inputs, defect: Defect | None) -> str:
    """What more can be found out about a failure on the host device: kernel, block, thread, line; "" where nothing.

    Without a defect it is sought in the order of threads. It takes many runs: once for each piece of work.
    """
    device = run.device
    if run.tally.failures or not isinstance(device, HostDevice) or device.options.sanitize:
        return ""
    try:
        replay = Replay(op, inputs, device)
        if defect is None:
            lines = replay.race(run.work.effort.shuffles)
        else:
            lines = (replay.memory_errors() if defect.memory else []) or replay.writer(defect)
    except SegnetError:
        return ""  # the fault itself has been reported
    return "".join(f"\n{line}" for line in lines)
