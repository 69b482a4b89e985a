"""Rows of the optimiser: its step, and the norm of the gradients that it clips by."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.cases import Bounds, Case, Inputs, Row
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.ops.optimiser.array_table import CHUNK
from segnet_scratch.ops.optimiser.gradient_norm import GradientNorm
from segnet_scratch.ops.optimiser.sgd import KeepFinite, SgdStep
from segnet_scratch.ops.optimiser.sgd_pack import SgdPackStep
from segnet_scratch.runtime.precision import BFLOAT16

RATES, DECAYS, MOMENTUM = (1.0, 2.0, 0.5), (5e-4, 0.0, 1e-2), 0.9

# Elements of three parameters; a block works on a chunk of 2^14 elements.
SIZES = {
    "size 1": (1, 1, 1),
    "a block of threads and one off": (255, 256, 257),
    "a chunk and one off": (CHUNK - 1, CHUNK, CHUNK + 1),
    "a large parameter between small ones": (3, 5 * CHUNK + 7, 64),
}


class ArraysRow(Row):
    """Three arrays of the optimiser, of `sizes`, with a few numbers beside them; `usual` are those of a plain case."""

    usual: ClassVar[dict[str, float]] = {"scale": 1.0}
    more: ClassVar[dict[str, tuple[tuple[int, ...], dict[str, float]]]] = {}  # further cases: sizes, numbers
    options: ClassVar[tuple[Any, ...]] = ()  # of the plan

    def cases(self) -> list[Case]:
        every = {reason: (sizes, dict[str, float]()) for reason, sizes in SIZES.items()} | self.more
        return [Case(reason, {"sizes": sizes, **self.usual, **numbers}) for reason, (sizes, numbers) in every.items()]

    def random_case(self, rng: np.random.Generator) -> Case:
        sizes = tuple(int(k) for k in rng.integers(1, 3 * CHUNK, 3))
        return Case("random", {"sizes": sizes, **self.random_numbers(rng)})

    def random_numbers(self, rng: np.random.Generator) -> dict[str, float]:
        """Those of a random case."""
        raise NotImplementedError

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op([(size,) for size in case["sizes"]], *self.options, dtype)  # type: ignore[call-arg]

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        numbers: Inputs = {name: np.array([case.sizes.get(name, 1.0)]) for name in ("lr", "scale") if name in op.inputs}
        return {**super().inputs(op, case, rng, integers), **numbers}


class SgdRow(ArraysRow):
    """A step over parameters of different sizes."""

    op: type[Op] = SgdStep
    options = (RATES, DECAYS, MOMENTUM)
    usual: ClassVar = {"lr": 0.1, "scale": 1.0}
    more: ClassVar = {
        "gradients scaled": ((5, 300, 7), {"scale": 0.3}),
        "gradients that are not finite": ((5, 300, 7), {"scale": np.nan}),
    }

    def random_numbers(self, rng: np.random.Generator) -> dict[str, float]:
        scale = float(rng.choice([1.0, rng.uniform(0, 1)]))
        return {"lr": float(10 ** rng.uniform(-5, 0)), "scale": scale}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        bounds: Bounds = {}
        for i, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
            w, g, m = (np.abs(getattr(b, f"{kind}{i}")) for kind in SgdStep.kinds)
            moved = m + np.nan_to_num(b.scale[0]) * g + decay * w
            bounds[f"momentum{i}"] = 4 * eps * moved
            bounds[f"parameter{i}"] = 4 * eps * (w + rate * b.lr[0] * moved)
        return bounds


def flipped(w: np.ndarray) -> np.ndarray:
    """The weight (o, kh, kw, c) of the backward convolution: (c, kh, kw, o), turned by half a circle."""
    return w[:, ::-1, ::-1].transpose(3, 1, 2, 0)


class SgdPackRow(SgdRow):
    """A step with copies in one to three planes. What lies beyond the outputs stays as it was."""

    op, elements = SgdPackStep, (np.dtype(np.float32), BFLOAT16)

    def cases(self) -> list[Case]:
        sizes = {
            "size 1": (1, 1, 1, 0),
            "no padding": (8, 3, 4, 0),
            "the classifier of SegNet": (21, 3, 64, 3),
            "a tile and one off": (31, 3, 33, 1),
            "whole tiles": (32, 1, 64, 0),
            "many tiles": (65, 3, 70, 7),
            "SegNet-Basic": (4, 7, 3, 4),
            "gradients that are not finite": (33, 3, 4, 7),
        }
        scales = {"gradients that are not finite": np.nan}
        return [
            Case(reason, {"weight": s, "lr": 0.1, "scale": scales.get(reason, 1.0 - 0.1 * i)})
            for i, (reason, s) in enumerate(sizes.items())
        ]

    def random_case(self, rng: np.random.Generator) -> Case:
        o, c, padding = (int(k) for k in rng.integers((1, 1, 0), (70, 70, 8)))
        return Case("random", {"weight": (o, int(rng.choice([1, 3, 5])), c, padding), "lr": 0.01, "scale": 0.5})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        # A weight with copies, a vector, and a weight with a flipped copy alone.
        o, k, c, padding = case["weight"]
        planes = 1 + (o + c) % 3
        shapes, copies = [(o, k, k, c), (o,), (c, k, k, o)], [(o + padding, k, k, planes * c), None, None]
        turned = [(c, k, k, o + padding), None, (o, k, k, c)]
        parameters = np.float64 if dtype == np.float64 else np.float32
        return SgdPackStep(shapes, *self.options, copies, turned, dtype, planes, dtype=parameters)

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        bounds = super().bound(op, b, eps)
        w0, w2 = np.asarray(bounds["parameter0"]), np.asarray(bounds["parameter2"])
        copy0 = np.pad(w0, [(0, len(b.copy0) - len(w0)), (0, 0), (0, 0), (0, 0)])
        return {**bounds, "copy0": copy0, "flipped0": flipped(copy0), "flipped2": flipped(w2)}

    def planes(self, op: Op, output: str) -> int:
        return op.planes if output == "copy0" else 1  # type: ignore[attr-defined]


class GradientNormRow(ArraysRow):
    """Gradients of different sizes, clipped and not. Squares of integers add up exactly."""

    op, exact = GradientNorm, True
    usual: ClassVar = {"largest": 10.0, "magnitude": 1.0}
    more: ClassVar = {
        "nothing to clip": ((5, 300, 7), {"largest": 1e9}),
        "all zero": ((5, 300, 7), {"largest": 1.0, "magnitude": 0.0}),
        "squares beyond float32": ((5, 300, 7), {"largest": 1.0, "magnitude": 1e25}),
        "squares below float32": ((5, 300, 7), {"largest": 1e-25, "magnitude": 1e-25}),
    }

    def random_numbers(self, rng: np.random.Generator) -> dict[str, float]:
        return {name: float(10 ** rng.uniform(-3, 3)) for name in ("largest", "magnitude")}

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return GradientNorm([(size,) for size in case["sizes"]], case["largest"], dtype)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        size, arrays = 1 if integers else case["magnitude"], super().inputs(op, case, rng, integers)
        scaled = {name: g * g.dtype.type(size) for name, g in arrays.items() if g is not None}
        return {**scaled, "scale": np.ones(1)}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # The outputs are doubles whatever the gradients are. Terms of one sign: relative errors add up at most.
        double = float(np.finfo(np.float64).eps)
        sizes = np.array(op.sizes)  # type: ignore[attr-defined]
        relative = double * (sizes.sum() + 2)
        return {
            "squares": double * sizes * b.squares,
            "norm": relative * b.norm,
            "scale": (relative + double) * b.scale,
        }


class KeepFiniteRow(ArraysRow):
    """Arrays of different sizes after a step that went well, and after one that did not."""

    op, exact = KeepFinite, True
    more: ClassVar = {"gradients that are not finite": ((5, CHUNK + 1, 7), {"scale": np.nan})}

    def random_numbers(self, rng: np.random.Generator) -> dict[str, float]:
        return {"scale": float(rng.choice([0.5, np.nan]))}


ROWS = SgdRow(), SgdPackRow(), GradientNormRow(), KeepFiniteRow()
