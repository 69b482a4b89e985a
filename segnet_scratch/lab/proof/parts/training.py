"""The same inputs give the same bits, again and again: whole training runs."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from segnet_scratch.config import Config
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.runtime.devices import Device
from segnet_scratch.segnet import SegNet
from segnet_scratch.step import TrainingStep


class Training(Part):
    """Runs of a small SegNet from the same seed: forward, backward, update; a hash of all it has learned."""

    name = "training"
    long = True
    proves = "training gives the same bits again"

    def targets(self, rows: Rows) -> Sequence[str]:
        return ["SegNet"]

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        steps, runs = work.effort.steps, work.effort.runs
        hashes = {self._train(device, steps, work.seed) for _ in range(runs)}
        tally.counts.update({"runs": runs, "steps each": steps})
        if len(hashes) > 1:
            yield f"{len(hashes)} hashes in {runs} runs of {steps} steps at 32x32, width 1/16: {sorted(hashes)}"

    def _train(self, device: Device, steps: int, seed: int) -> str:
        rng = np.random.default_rng(seed)
        model = SegNet(5, 1 / 16, device, dropout=True, seed=seed)
        step = TrainingStep(model, settings=Config(seed=seed))
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
