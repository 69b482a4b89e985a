"""Results against the reference: within the row's bound, or equal where inputs are integers."""

import numpy as np

from segnet_scratch.lab.proof.compare import examine
from segnet_scratch.lab.proof.parts.base import CaseRun, RowPart, blame
from segnet_scratch.lab.proof.work import Effort
from segnet_scratch.ops.cases import Row


class Reference(RowPart):
    """Every element type of the row, each run twice, with unlike contents of outputs and guard zones."""

    name = "reference"
    proves = "results within the row's bound, whatever memory held; nothing else is written"

    def random(self, effort: Effort) -> int:
        return effort.shapes

    def prove_case(self, run: CaseRun) -> None:
        in_double = run.index < len(run.row.cases()) + run.work.effort.doubles
        usual, *others = run.row.elements
        for dtype in (usual, *(others if in_double else ())):
            _examine(run, dtype.name, dtype)


class Integers(RowPart):
    """Small integers, whose sums have no rounding errors."""

    name = "integers"
    proves = "results equal to the last bit for integer inputs"

    def random(self, effort: Effort) -> int:
        return effort.integers

    def takes(self, row: Row) -> bool:
        return row.exact

    def prove_case(self, run: CaseRun) -> None:
        _examine(run, "integers", run.row.elements[0], integers=True)


def _examine(run: CaseRun, how: str, dtype: np.dtype, integers: bool = False) -> None:
    rng = run.row.generator(run.work.seed, run.index)
    found = examine(run.row, run.case, run.device, rng, dtype, integers)
    run.tally.counts.update({f"in {how}": 1, "arrays between guard zones": found.guarded})
    for problem in found.problems:
        # To find the culprit takes many runs: once for each piece of work.
        culprit = "" if run.tally.failures else blame(found.op, found.inputs, run.device, problem)
        run.fail(how, f"{problem}{culprit}")
