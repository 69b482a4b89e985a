"""Other runs of an op must give the bits of its first run: in other orders, builds and memory, and again and again.

`Sanitizers` runs in a process that has the sanitizer's library preloaded (see lab/proof/processes.py). The first report
ends that process; whoever started it reads what it wrote to stderr.
"""

from collections.abc import Iterator
from typing import ClassVar

from segnet_scratch.lab.proof.compare import Defect, run_guarded
from segnet_scratch.lab.proof.parts.base import CaseRun, RowPart, Rows, blame, reason_against
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import Effort, Work
from segnet_scratch.lab.workbench.guards import FIRST, SECOND, Fill
from segnet_scratch.runtime.devices import Device, HostDevice
from segnet_scratch.runtime.host import VARIABLES, sanitizer_runtime, variable_flags

Another = tuple[str, Device, Fill]  # how a run differs from the first one, on what it is made, what memory holds


class SameBits(RowPart):
    """Subclasses say what other runs there are of a case."""

    counted: ClassVar[str]  # what the other runs are called
    unlike: ClassVar[str]  # what an output is that has other bits
    race: ClassVar[bool] = False  # is it the order of threads that makes the difference?

    def others(self, run: CaseRun) -> Iterator[Another]:
        """All runs but the first."""
        raise NotImplementedError

    def prove_case(self, run: CaseRun) -> None:
        op, inputs = run.op_and_inputs()
        first = run_guarded(op, inputs, run.device)
        for how, device, fill in self.others(run):
            run.tally.counts[self.counted] += 1
            with run.attempt(how):
                if found := first.unlike(run_guarded(op, inputs, device, fill)):
                    array, element = found
                    defect = Defect(array, f"{array}{list(element)} {self.unlike}", element)
                    run.fail(how, f"{defect}{blame(run, op, inputs, None if self.race else defect)}")


class _OnHost(SameBits):
    """On the host device with other options."""

    devices = ("host",)

    def options(self, run: CaseRun) -> Iterator[tuple[str, dict[str, object]]]:
        """What each run is called, and in what its options differ."""
        raise NotImplementedError

    def others(self, run: CaseRun) -> Iterator[Another]:
        assert isinstance(run.device, HostDevice)
        for how, options in self.options(run):
            yield how, run.device.with_options(**options), FIRST


class Orders(_OnHost):
    """Ascending, descending and shuffled, on one and two workers; a barrier that not all threads reach is an error."""

    name = "orders"
    proves = "same bits in every order of threads and blocks; every barrier reached by all threads"
    random, counted, race = "ordered", "runs in other orders", True
    unlike = "has other bits than in ascending order of threads and blocks"

    def options(self, run: CaseRun) -> Iterator[tuple[str, dict[str, object]]]:
        # The first order again, by two workers: which of them is first changes from run to run.
        yield "ascending order, 2 workers", {"workers": 2}
        yield "descending order", {"order": "descending"}
        for seed in range(1, run.work.effort.shuffles + 1):
            workers = 1 + seed % 2
            how = f"shuffled order (seed {seed}), {workers} worker{'s' if workers > 1 else ''}"
            yield how, {"order": "shuffled", "seed": seed, "workers": workers}


class Variables(_OnHost):
    """No variable is read before it has a value: two builds, whose automatic variables hold zeros or a pattern."""

    name = "variables"
    proves = "same bits whatever automatic variables hold before they get a value"
    random, counted = "variables", "runs of other builds"
    unlike = "depends on a variable that is read before it is set"

    def unavailable(self) -> str:
        return reason_against(lambda: variable_flags(VARIABLES[0]))

    def options(self, run: CaseRun) -> Iterator[tuple[str, dict[str, object]]]:
        return ((f"automatic variables: {variables}", {"variables": variables}) for variables in VARIABLES)


class Sanitizers(_OnHost):
    """AddressSanitizer and UBSan. Guard zones are out of bounds here, so that a read of them is reported as well."""

    name = "sanitizers"
    proves = "no report by AddressSanitizer and UBSan, same bits as without"
    sanitized = True
    random, counted, unlike = "sanitized", "runs of the usual build", "has other bits than in the sanitized build"

    def unavailable(self) -> str:
        return reason_against(sanitizer_runtime)

    def options(self, run: CaseRun) -> Iterator[tuple[str, dict[str, object]]]:
        yield "usual build", {"sanitize": False}


class Repeats(SameBits):
    """One random case of each row, into memory of changing contents."""

    name = "repeats"
    proves = "an op gives the same bits again and again"
    counted, unlike = "repetitions", "has other bits than in run 0"

    def works(self, device: str, effort: Effort, seed: int, rows: Rows = ROWS) -> Iterator[Work]:
        for row in self.targets(rows):
            yield Work(self.name, device, row, len(row_named(row).cases()), 1, seed, effort)

    def others(self, run: CaseRun) -> Iterator[Another]:
        return ((f"run {k}", run.device, (FIRST, SECOND)[k % 2]) for k in range(1, run.work.effort.repeats))
