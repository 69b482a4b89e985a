"""Row of the optimiser's step."""

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.device import Array, Device
from segnet_scratch.ops.op import Buffers, Op, spec
from segnet_scratch.ops.sgd import CHUNK, SgdStep
from segnet_scratch.proof.rows.base import Bounds, Case, Inputs, Row


class SgdOp(Op):
    """SgdStep for three parameters behind the face of an Op, so that the table can treat it like all others."""

    name = "sgd_step"
    updates = ("w0", "w1", "w2", "m0", "m1", "m2")
    RATES, DECAYS, MOMENTUM = (1.0, 2.0, 0.5), (5e-4, 0.0, 1e-2), 0.9

    def __init__(self, sizes: tuple[int, int, int], dtype: DTypeLike) -> None:
        self.inputs = {f"{kind}{i}": spec((size,), dtype) for kind in "wgm" for i, size in enumerate(sizes)}
        self.inputs["lr"] = spec((1,), np.float64)
        self.outputs = {}
        self.workspace = {}
        self.flops = 6 * sum(sizes)

    def run(self, device: Device, b: Buffers) -> None:
        w, g, m = self._arrays(b)
        SgdStep(device, w, m, self.RATES, self.DECAYS, self.MOMENTUM)(g, b.lr)

    def reference(self, b: Buffers) -> None:
        for w, g, m, rate, decay in zip(*self._arrays(b), self.RATES, self.DECAYS, strict=True):
            m[...] = self.MOMENTUM * m + g + decay * w
            w[...] = w - rate * b.lr[0] * m

    @staticmethod
    def _arrays(b: Buffers) -> tuple[list[Array], list[Array], list[Array]]:
        w, g, m = ([getattr(b, f"{kind}{i}") for i in range(3)] for kind in "wgm")
        return w, g, m


class SgdRow(Row):
    """A step over parameters of different sizes; a block works on a chunk of 2^14 elements."""

    name = "sgd_step"
    op = SgdOp
    typed = False  # SgdStep, which is no Op, looks at the arrays themselves

    def cases(self) -> list[Case]:
        sizes = {
            "size 1": (1, 1, 1),
            "a block of threads and one off": (255, 256, 257),
            "a chunk and one off": (CHUNK - 1, CHUNK, CHUNK + 1),
            "a large parameter between small ones": (3, 5 * CHUNK + 7, 64),
        }
        return [Case(reason, {"sizes": s, "lr": 0.1}) for reason, s in sizes.items()]

    def random_case(self, rng: np.random.Generator) -> Case:
        sizes = tuple(int(k) for k in rng.integers(1, 3 * CHUNK, 3))
        return Case("random", {"sizes": sizes, "lr": float(10 ** rng.uniform(-5, 0))})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return SgdOp(case["sizes"], dtype)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        return {**super().inputs(op, case, rng, integers), "lr": np.array([case["lr"]])}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        bounds: Bounds = {}
        for i, (rate, decay) in enumerate(zip(SgdOp.RATES, SgdOp.DECAYS, strict=True)):
            w, g, m = (np.abs(getattr(b, f"{kind}{i}")) for kind in "wgm")
            bounds[f"m{i}"] = 4 * eps * (m + g + decay * w)
            bounds[f"w{i}"] = 4 * eps * (w + rate * b.lr[0] * (m + g + decay * w))
        return bounds
