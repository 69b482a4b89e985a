"""The same inputs give the same bits, again and again: ops by themselves, and whole training runs."""

import hashlib
from collections.abc import Iterator

import numpy as np

from segnet_scratch.lab.proof.compare import run_guarded
from segnet_scratch.lab.proof.parts.base import CaseRun, Part, RowPart
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.lab.workbench.guards import FIRST, SECOND
from segnet_scratch.ops.cases import Row
from segnet_scratch.runtime.devices import Device
from segnet_scratch.segnet import SegNet
from segnet_scratch.step import TrainingStep


class Repeats(RowPart):
    """One random case of each row, into memory of changing contents."""

    name = "repeats"
    proves = "an op gives the same bits again and again"

    def random(self, effort: Effort) -> int:
        return 1

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
        for row in rows:
            yield Work(self.name, device, row.name, len(row.cases()), 1, seed, effort)

    def prove_case(self, run: CaseRun) -> None:
        op, inputs = run.op_and_inputs()
        hashes = [
            hash_of(run_guarded(op, inputs, run.device, (FIRST, SECOND)[k % 2]).outputs)
            for k in range(run.work.effort.repeats)
        ]
        run.tally.counts["runs"] += len(hashes)
        unlike = [k for k, found in enumerate(hashes) if found != hashes[0]]
        if unlike:
            run.fail("", f"run {unlike[0]} has another hash than run 0, and {len(unlike) - 1} others have")


class Training(Part):
    """Runs of a small SegNet from the same seed: forward, backward, update; a hash of all it has learned."""

    name = "training"
    long = True
    proves = "training gives the same bits again"

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
        yield Work(self.name, device, "SegNet", 0, effort.runs, seed, effort)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        steps = work.effort.steps
        hashes = [self._train(device, steps, work.seed) for _ in range(work.count)]
        tally.counts.update({"runs": len(hashes), "steps each": steps})
        if len(set(hashes)) > 1:
            case = f"{steps} steps at 32x32, width 1/16"
            yield f"{len(set(hashes))} hashes in {len(hashes)} runs of {case}: {hashes}"

    def _train(self, device: Device, steps: int, seed: int) -> str:
        rng = np.random.default_rng(seed)
        model = SegNet(5, 1 / 16, device, dropout=True, seed=seed)
        step = TrainingStep(model, seed=seed)
        for number in range(steps):
            images = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
            step(images, rng.integers(0, 5, (2, 32, 32)), 0.01, number)
        return hash_of(model.state_dict() | step.optimiser.state_dict())


def hash_of(arrays: dict[str, np.ndarray]) -> str:
    """Of names, shapes, types and every bit."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
