"""Hand-written gradients against numeric ones, in float64: ops, and whole networks."""

from collections.abc import Iterator

from segnet_scratch.lab.proof.gradcheck import DIRECTIONS, RTOL, Result, check_cases
from segnet_scratch.lab.proof.parts.base import Part, device_of
from segnet_scratch.lab.proof.problems import NETWORKS, differentiables
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.ops.cases import Row

NETWORK = "segnet"
CASES_AT_ONCE = 10


class _Checked(Part):
    """What ops and networks have in common: results of the gradient check in a tally."""

    def _tally(self, work: Work, result: Result) -> Tally:
        tally = Tally(worst=result.worst)
        tally.counts.update({"derivatives": result.compared, "tensors": result.tensors})
        tally.counts["lost to kinks"] = round(result.skipped * result.compared / max(1 - result.skipped, 1e-9))
        if not result.passed:
            tally.fail(
                work, work.target, f"cases {work.first} to {work.first + work.count - 1}, seed {work.seed}", result
            )
        return tally

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

    def do(self, work: Work) -> Tally:
        indices = range(work.first, work.first + work.count)
        tally = Tally()
        with tally.attempt(work, work.target, f"cases {work.first} to {work.first + work.count - 1}"):
            result = check_cases(work.target, device_of(work), work.seed, indices, directions=DIRECTIONS)
            tally.add(self._tally(work, result))
            tally.counts.update({"ops": int(work.first == 0), "shapes": work.count})
        return tally


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

    def do(self, work: Work) -> Tally:
        tally = Tally()
        with tally.attempt(work, work.target, f"network {work.first}, seed {work.seed}"):
            directions = work.effort.directions
            result = check_cases(work.target, device_of(work), work.seed, [work.first], directions=directions)
            tally.add(self._tally(work, result))
            tally.counts.update({"networks": 1})
        return tally
