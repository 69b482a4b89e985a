"""Hand-written gradients against numeric ones, in float64: ops, and whole networks."""

from collections.abc import Iterator

from segnet_scratch.lab.proof.gradcheck import DIRECTIONS, RTOL, Result, check_cases
from segnet_scratch.lab.proof.parts.base import Part
from segnet_scratch.lab.proof.problems import NETWORKS, differentiables
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.ops.cases import Row
from segnet_scratch.runtime.devices import Device

NETWORK = "segnet"
CASES_AT_ONCE = 10


class _Checked(Part):
    """What ops and networks have in common: results of the gradient check in a tally."""

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[Result]:
        indices = range(work.first, work.first + work.count)
        result = check_cases(work.target, device, work.seed, indices, directions=self.directions(work.effort))
        tally.worst = result.worst
        tally.counts.update({"derivatives": result.compared, "tensors": result.tensors, **self.counts(work)})
        tally.counts["lost to kinks"] = round(result.skipped * result.compared / max(1 - result.skipped, 1e-9))
        if not result.passed:
            yield result

    def directions(self, effort: Effort) -> int:
        """Of each input, where there are many elements."""
        return DIRECTIONS

    def counts(self, work: Work) -> dict[str, int]:
        """How many of what a piece of work checks."""
        return {"ops": int(work.first == 0), "shapes": work.count}

    def ran(self, tally: Tally) -> str:
        lost = tally.counts["lost to kinks"]
        share = lost / max(tally.counts["derivatives"] + lost, 1)
        counts = {what: count for what, count in tally.counts.items() if what != "lost to kinks"}
        text = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        return f"{text}, {share:.1%} lost to kinks; worst error {tally.worst:.1e} (limit {RTOL['float64']:.0e})"


class Gradients(_Checked):
    """Every element of inputs up to 500 elements, random directions of larger ones."""

    name = "gradients"
    proves = "hand-written gradients of every op equal numeric ones"

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
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

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
        if rows is ROWS:
            for offset in range(effort.networks):
                for index in range(min(effort.kinds, len(NETWORKS))):
                    yield Work(self.name, device, NETWORK, index, 1, seed + offset, effort)

    def directions(self, effort: Effort) -> int:
        return effort.directions

    def counts(self, work: Work) -> dict[str, int]:
        return {"networks": 1}
