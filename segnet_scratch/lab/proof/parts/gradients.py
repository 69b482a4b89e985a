"""Hand-written gradients against numeric ones, in float64: ops, and whole networks."""

from collections.abc import Iterator
from itertools import product

from segnet_scratch.lab.proof.differentiable import NETWORKS, differentiables
from segnet_scratch.lab.proof.gradcheck import DIRECTIONS, RTOL, Result, check_cases
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.runtime.devices import Device

NETWORK = "segnet"
LOST = "lost to kinks"
CASES_AT_ONCE = 10


class _Checked(Part):
    """What ops and networks have in common: results of the gradient check in a tally."""

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[Result]:
        indices = range(work.first, work.first + work.count)
        result = check_cases(work.target, device, work.seed, indices, directions=self.directions(work.effort))
        tally.worst = result.worst
        what = {"networks": 1} if work.target == NETWORK else {"ops": int(work.first == 0), "shapes": work.count}
        tally.counts.update({"derivatives": result.compared, "tensors": result.tensors, **what, LOST: result.given_up})
        if not result.passed:
            yield result

    def directions(self, effort: Effort) -> int:
        """Of each input, where there are many elements."""
        return DIRECTIONS

    def ran(self, tally: Tally) -> str:
        counts = {**tally.counts}
        lost, compared = counts.pop(LOST, 0), counts.get("derivatives", 0)
        text = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        share = f"{lost / max(compared + lost, 1):.1%} {LOST}"
        return f"{text}, {share}; worst error {tally.worst:.1e} (limit {RTOL['float64']:.0e})"


class Gradients(_Checked):
    """Every element of inputs up to 500 elements, random directions of larger ones."""

    name = "gradients"
    proves = "hand-written gradients of every op equal numeric ones"

    def works(self, device: str, effort: Effort, seed: int, rows: Rows = ROWS) -> Iterator[Work]:
        for name, op in differentiables().items():
            if name == NETWORK or not any(row.op.name.startswith(name) for row in rows):
                continue
            cases = effort.gradients or op.usual
            for first in range(0, cases, CASES_AT_ONCE):
                yield Work(self.name, device, name, first, min(CASES_AT_ONCE, cases - first), seed, effort)


class Networks(_Checked):
    """Every parameter tensor, and the image, of small networks with their loss."""

    name = "networks"
    long = True
    proves = "gradients of whole networks, every parameter tensor, equal numeric ones"

    def works(self, device: str, effort: Effort, seed: int, rows: Rows = ROWS) -> Iterator[Work]:
        for offset, index in product(range(effort.networks), range(min(effort.kinds, len(NETWORKS)))):
            if rows is ROWS:
                yield Work(self.name, device, NETWORK, index, 1, seed + offset, effort)

    def directions(self, effort: Effort) -> int:
        return effort.directions
