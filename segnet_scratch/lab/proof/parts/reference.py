"""Results against the reference: within the row's bound, or equal where inputs are integers; and against the host's."""

from pathlib import Path

import numpy as np

from segnet_scratch.lab.proof.compare import Expectation, examine, expectation, run_guarded, same_bits
from segnet_scratch.lab.proof.parts.base import CaseRun, RowPart, blame
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.ops.cases import Row
from segnet_scratch.ops.convolution.conv2d_cases import TensorCoreRow
from segnet_scratch.ops.convolution.conv2d_fused_cases import FusedRow
from segnet_scratch.ops.loss.cases import CrossEntropyRow
from segnet_scratch.runtime.devices import NumpyDevice, get_device


class _Compared(RowPart):
    """What results are compared with can be computed by another process, and is then read from a file."""

    ahead = True

    def do(self, work: Work) -> Tally:
        if not work.ahead:
            return super().do(work)
        tally = Tally()
        for run in self.runs(work, NumpyDevice(), tally):
            for dtype in self.elements(run):
                with np.errstate(all="ignore"), run.attempt():
                    _save(_file(run, dtype), self.expected(run, dtype))
        return tally

    def elements(self, run: CaseRun) -> tuple[np.dtype, ...]:
        """The element types that a case is run in."""
        return run.row.elements[:1]

    def expected(self, run: CaseRun, dtype: np.dtype) -> Expectation:
        """What the results must be."""
        raise NotImplementedError

    def found(self, run: CaseRun, dtype: np.dtype) -> Expectation | None:
        """The same, where it has been made ahead; it is needed once."""
        file = _file(run, dtype)
        return _load(file) if run.work.folder and file.exists() else None


class Reference(_Compared):
    """Every element type of the row, each run twice, with unlike contents of outputs and guard zones."""

    name = "reference"
    proves = "results within the row's bound, whatever memory held; nothing else is written"
    random = "shapes"
    integers = False

    def elements(self, run: CaseRun) -> tuple[np.dtype, ...]:
        in_double = run.index < len(run.row.cases()) + run.work.effort.doubles
        return run.row.elements if in_double else run.row.elements[:1]

    def expected(self, run: CaseRun, dtype: np.dtype) -> Expectation:
        inputs = run.row.inputs(run.row.plan(run.case, dtype), run.case, self.generator(run), self.integers)
        return expectation(run.row, run.case, inputs, dtype, self.integers)

    def generator(self, run: CaseRun) -> np.random.Generator:
        """Of the inputs."""
        return run.row.generator(run.work.seed, run.index)

    def prove_case(self, run: CaseRun) -> None:
        for dtype in self.elements(run):
            how = "integers" if self.integers else dtype.name
            expected = self.found(run, dtype)
            found = examine(run.row, run.case, run.device, self.generator(run), dtype, self.integers, expected)
            run.tally.counts.update({f"in {how}": 1, "arrays between guard zones": found.guarded})
            for defect in found.defects:
                run.fail(how, f"{defect}{blame(run, found.op, found.inputs, defect)}")


class Integers(Reference):
    """Small integers, whose sums have no rounding errors."""

    name = "integers"
    proves = "results equal to the last bit for integer inputs"
    random = "integers"
    integers = True

    def takes(self, row: Row) -> bool:
        return row.exact

    def elements(self, run: CaseRun) -> tuple[np.dtype, ...]:
        return run.row.elements[:1]


class HostBits(_Compared):
    """The host device is what all other proofs ran on.

    Two things excuse a row: exp and log, which differ between libraries, and tensor cores, whose order of additions is
    not documented.
    """

    name = "host bits"
    proves = "a GPU gives the bits of the host device"
    devices = ("cuda",)

    def takes(self, row: Row) -> bool:
        return not isinstance(row, CrossEntropyRow | TensorCoreRow | FusedRow)

    def expected(self, run: CaseRun, dtype: np.dtype) -> Expectation:
        outputs = run_guarded(*run.op_and_inputs(), get_device("host")).outputs
        return {name: (array, 0.0) for name, array in outputs.items()}

    def prove_case(self, run: CaseRun) -> None:
        (dtype,) = self.elements(run)
        theirs = self.found(run, dtype) or self.expected(run, dtype)
        ours = run_guarded(*run.op_and_inputs(), run.device).outputs
        for name, (array, _) in theirs.items():
            if not same_bits(ours[name], array):
                run.fail("", f"{name}: other bits than on the host device")


def _file(run: CaseRun, dtype: np.dtype) -> Path:
    return Path(run.work.folder) / f"{run.work.part} {run.row.name} {run.index} {dtype.name}.npz"


def _save(file: Path, expected: Expectation) -> None:
    # NumPy's files do not know bfloat16: the type goes by its name.
    arrays = {f"{name} {wanted.dtype.name}": wanted for name, (wanted, _) in expected.items()}
    bounds = {f"bound of {name}": np.asarray(bound) for name, (_, bound) in expected.items()}
    np.savez(file, **arrays, **bounds)  # type: ignore[arg-type]


def _load(file: Path) -> Expectation:
    with np.load(file) as held:
        names = [key.split(" ") for key in held.files if not key.startswith("bound of ")]
        found = {name: (held[f"{name} {kind}"].view(kind), held[f"bound of {name}"]) for name, kind in names}
    file.unlink()
    return found
