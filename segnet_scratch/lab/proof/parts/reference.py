"""Results against the reference: within the row's bound, or equal where inputs are integers; and against the host's."""

from segnet_scratch.lab.proof.compare import examine, run_guarded, same_bits
from segnet_scratch.lab.proof.parts.base import CaseRun, RowPart, blame, reason_against
from segnet_scratch.ops.cases import Row
from segnet_scratch.ops.convolution.conv2d_cases import TensorCoreRow
from segnet_scratch.ops.convolution.conv2d_fused_cases import FusedRow
from segnet_scratch.ops.loss.cases import CrossEntropyRow, LogSoftmaxRow
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.runtime.host import find_compiler


class Reference(RowPart):
    """Every element type of the row, each run twice, with unlike contents of outputs and guard zones."""

    name = "reference"
    proves = "results within the row's bound, whatever memory held; nothing else is written"
    random = "shapes"
    integers = False

    def prove_case(self, run: CaseRun) -> None:
        in_all = not self.integers and run.index < len(run.row.cases()) + run.work.effort.doubles
        for dtype in run.row.elements if in_all else run.row.elements[:1]:
            how = "integers" if self.integers else dtype.name
            rng = run.row.generator(run.work.seed, run.index)
            found = examine(run.row, run.case, run.device, rng, dtype, self.integers)
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


class HostBits(RowPart):
    """The host device is what all other proofs ran on.

    Two things excuse a row: exp, log and powers, which differ between libraries, and tensor cores, whose order of
    additions is not documented.
    """

    name = "host bits"
    proves = "a GPU gives the bits of the host device"
    devices = ("cuda",)

    def takes(self, row: Row) -> bool:
        excused = isinstance(row, CrossEntropyRow | LogSoftmaxRow | TensorCoreRow | FusedRow)
        return not excused and not row.name.endswith(("_exp", "_log", "_power", "_mma_plain"))

    def unavailable(self) -> str:
        return reason_against(find_compiler)

    def prove_case(self, run: CaseRun) -> None:
        op, inputs = run.op_and_inputs()
        ours, theirs = (run_guarded(op, inputs, device).outputs for device in (run.device, get_device("host")))
        for name, array in theirs.items():
            if not same_bits(ours[name], array):
                run.fail("", f"{name}: other bits than on the host device")
