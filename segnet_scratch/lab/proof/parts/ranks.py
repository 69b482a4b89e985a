"""NCCL on one GPU: what it can show of sums between several."""

from collections.abc import Iterator

import numpy as np

from segnet_scratch.lab.proof.parts.base import Part, reason_against
from segnet_scratch.lab.proof.parts.steps import CLASSES, Steps
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.parallel.communicator import ALONE, Communicator, Value
from segnet_scratch.parallel.nccl import NcclArrays, new_identity
from segnet_scratch.runtime.devices import Device, nccl_library
from segnet_scratch.segnet import SegNetBasic


class _WithNobody(Communicator):
    """Rank 0 of two, of which the other has nothing but void: NCCL is given this one alone."""

    size = 2

    def __init__(self) -> None:
        self.arrays = NcclArrays(new_identity(), 0, 1)

    def exchange(self, value: Value) -> list[Value]:
        return [value, type(value)()]


class Nccl(Part):
    """Gradients through NCCL in buckets beside backward, in steps of both engines and in their graphs."""

    name = "nccl"
    proves = "sums by NCCL, with one rank, leave a training step's bits; in a graph, too"
    devices = ("cuda",)

    def unavailable(self) -> str:
        return reason_against(nccl_library)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        ranks = _WithNobody()
        values = np.arange(6.0, dtype=np.float32).reshape(2, 3)
        gathered = device.download(ranks.arrays.gather(device, device.upload(values)))
        if gathered.shape != (1, 2, 3) or not np.array_equal(gathered[0], values):
            yield f"gathered from one rank: {gathered}"

        for engine in ("layers", "fused"):
            models = {of: SegNetBasic(CLASSES, 1 / 8, device, seed=1) for of in (ALONE, ranks)}
            steps = (Steps(model, 1, (32, 32), engine=engine, ranks=of) for of, model in models.items())
            plain, through = (of_rank.learned(3) for of_rank in steps)
            tally.counts["steps"] += len(plain[0])
            if plain != through:
                yield f"{engine}: losses and weights {plain}, through NCCL {through}"
