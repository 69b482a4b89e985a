"""Rows of the optimiser: its step, and the norm of the gradients that it clips by."""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.cases import Bounds, Case, Inputs, Row, Shape
from segnet_scratch.ops.op import Buffers, Op, expect_float, spec
from segnet_scratch.ops.optimiser.array_table import CHUNK, chunks_of
from segnet_scratch.ops.optimiser.gradient_norm import GradientNorm
from segnet_scratch.ops.optimiser.sgd import KeepFinite, SgdStep
from segnet_scratch.ops.optimiser.sgd_pack import SgdPackStep
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.precision import BFLOAT16


class SgdOp(Op):
    """SgdStep for three parameters behind the face of an Op, so that the table can treat it like all others."""

    name = "sgd_step"
    updates: ClassVar[tuple[str, ...]] = ("w0", "w1", "w2", "m0", "m1", "m2")
    RATES, DECAYS, MOMENTUM = (1.0, 2.0, 0.5), (5e-4, 0.0, 1e-2), 0.9

    def __init__(self, sizes: Sequence[int | Shape], dtype: DTypeLike) -> None:
        shapes = [size if isinstance(size, tuple) else (size,) for size in sizes]
        self.inputs = {f"{kind}{i}": spec(shape, dtype) for kind in "wgm" for i, shape in enumerate(shapes)}
        self.inputs |= {"lr": spec((1,), np.float64), "scale": spec((1,), np.float64)}
        self.outputs, self.workspace, self.flops = {}, {}, 7 * sum(prod(shape) for shape in shapes)

    def run(self, device: Device, b: Buffers) -> None:
        w, g, m = self._arrays(b)
        SgdStep(device, w, m, self.RATES, self.DECAYS, self.MOMENTUM)(g, b.lr, b.scale)

    def reference(self, b: Buffers) -> None:
        if np.isnan(b.scale[0]):
            return
        for w, g, m, rate, decay in zip(*self._arrays(b), self.RATES, self.DECAYS, strict=True):
            m[...] = self.MOMENTUM * m + b.scale[0] * g + decay * w
            w[...] = w - rate * b.lr[0] * m

    @staticmethod
    def _arrays(b: Buffers) -> tuple[list[Array], list[Array], list[Array]]:
        w, g, m = ([getattr(b, f"{kind}{i}") for i in range(3)] for kind in "wgm")
        return w, g, m


# Elements of three parameters; a block works on a chunk of 2^14 elements.
SIZES = {
    "size 1": (1, 1, 1),
    "a block of threads and one off": (255, 256, 257),
    "a chunk and one off": (CHUNK - 1, CHUNK, CHUNK + 1),
    "a large parameter between small ones": (3, 5 * CHUNK + 7, 64),
}


class ArraysRow(Row):
    """Three arrays of the optimiser, of `sizes`, with a few numbers beside them; `usual` are those of a plain case."""

    typed = False  # what is behind the op looks at the arrays itself
    usual: ClassVar[dict[str, float]] = {"scale": 1.0}
    more: ClassVar[dict[str, tuple[tuple[int, ...], dict[str, float]]]] = {}  # further cases: sizes, numbers

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
        return self.op(case["sizes"], dtype)  # type: ignore[call-arg]

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        numbers = {name: np.array([case.sizes.get(name, 1.0)]) for name in ("lr", "scale") if name in op.inputs}
        return {**super().inputs(op, case, rng, integers), **numbers}


class SgdRow(ArraysRow):
    """A step over parameters of different sizes."""

    name = "sgd_step"
    op: type[Op] = SgdOp
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
        for i, (rate, decay) in enumerate(zip(SgdOp.RATES, SgdOp.DECAYS, strict=True)):
            w, g, m = (np.abs(getattr(b, f"{kind}{i}")) for kind in "wgm")
            moved = m + np.nan_to_num(b.scale[0]) * g + decay * w
            bounds |= {f"m{i}": 4 * eps * moved, f"w{i}": 4 * eps * (w + rate * b.lr[0] * moved)}
        return bounds


def flipped(w: np.ndarray) -> np.ndarray:
    """The weight (o, kh, kw, c) of the backward convolution: (c, kh, kw, o), turned by half a circle."""
    return w[:, ::-1, ::-1].transpose(3, 1, 2, 0)


class SgdPackOp(SgdOp):
    """SgdPackStep for a weight with copies, a vector and a weight with a flipped copy alone, as an Op."""

    name = "sgd_pack_step"
    updates = (*SgdOp.updates, "copy0", "flipped0", "flipped2")

    def __init__(self, o: int, k: int, c: int, padding: int, storage: DTypeLike) -> None:
        self.storage = np.dtype(storage)  # for the reference everything is float64
        super().__init__([(o, k, k, c), (o,), (c, k, k, o)], np.float64 if storage == np.float64 else np.float32)
        copies = {"copy0": (o + padding, k, k, c), "flipped0": (c, k, k, o + padding), "flipped2": (o, k, k, c)}
        self.inputs = {**self.inputs, **{name: spec(shape, storage) for name, shape in copies.items()}}

    def run(self, device: Device, b: Buffers) -> None:
        w, g, m = self._arrays(b)
        copies = (b.copy0, None, None), (b.flipped0, None, b.flipped2)
        step = SgdPackStep(device, w, m, self.RATES, self.DECAYS, self.MOMENTUM, *copies, self.storage)
        step(g, b.lr, b.scale)

    def reference(self, b: Buffers) -> None:
        super().reference(b)
        if not np.isnan(b.scale[0]):
            b.copy0[: len(b.w0)], b.flipped0[..., : len(b.w0)], b.flipped2[...] = b.w0, flipped(b.w0), flipped(b.w2)


class SgdPackRow(SgdRow):
    """A step with copies in float32 or bfloat16. What lies beyond the outputs stays as it was."""

    name, op = "sgd_pack_step", SgdPackOp
    elements = (np.dtype(np.float32), BFLOAT16)

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
        return SgdPackOp(*case["weight"], dtype)  # type: ignore[call-arg]

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        bounds, copies = super().bound(op, b, eps), {n: np.zeros(s.shape) for n, s in op.inputs.items()}
        w0, w2, o = np.asarray(bounds["w0"]), np.asarray(bounds["w2"]), len(b.w0)
        copies["copy0"][:o], copies["flipped0"][..., :o] = w0, flipped(w0)
        return {**bounds, "copy0": copies["copy0"], "flipped0": copies["flipped0"], "flipped2": flipped(w2)}


class GradientNormOp(Op):
    """GradientNorm of three gradients behind the face of an Op."""

    name = "gradient_norm"
    updates = ("scale",)

    def __init__(self, sizes: Sequence[int], largest: float, dtype: DTypeLike) -> None:
        self.largest = largest
        self.inputs = {f"g{i}": spec((size,), dtype) for i, size in enumerate(sizes)}
        for name, gradient in self.inputs.items():
            expect_float(self.name, name, gradient)
        self.inputs["scale"] = spec((1,), np.float64)
        self.outputs = {name: spec((size,), np.float64) for name, size in (("squares", 3), ("norm", 1))}
        self.workspace = {"partials": spec((len(chunks_of(sizes)),), np.float64)}
        self.flops = 2 * sum(sizes)

    def run(self, device: Device, b: Buffers) -> None:
        gradients = [b.g0, b.g1, b.g2]
        # The numpy device takes no workspace, and a call that allocates its arrays gives it none.
        partials = b.partials if hasattr(b, "partials") else device.empty(self.workspace["partials"].shape, np.float64)
        outputs = {"squares": b.squares, "norm": b.norm, "scale": b.scale, "partials": partials}
        GradientNorm(device, gradients, self.largest, **outputs)(gradients)

    def reference(self, b: Buffers) -> None:
        b.squares[...] = [(g.astype(np.float64) ** 2).sum() for g in (b.g0, b.g1, b.g2)]
        b.norm[...] = np.sqrt(b.squares.sum())
        b.scale[...] = min(1, self.largest / b.norm[0]) if b.norm[0] > 0 else 1


class GradientNormRow(ArraysRow):
    """Gradients of different sizes, clipped and not. Squares of integers add up exactly."""

    name, op, exact, typed = "gradient_norm", GradientNormOp, True, True
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
        return GradientNormOp(case["sizes"], case["largest"], dtype)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        size, arrays = 1 if integers else case["magnitude"], super().inputs(op, case, rng, integers)
        scaled = {name: g * g.dtype.type(size) for name, g in arrays.items() if g is not None}
        return {**scaled, "scale": np.ones(1)}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # The outputs are doubles whatever the gradients are. Terms of one sign: relative errors add up at most.
        double, sizes = float(np.finfo(np.float64).eps), np.array([b.g0.size, b.g1.size, b.g2.size])
        relative = double * (sizes.sum() + 2)
        return {
            "squares": double * sizes * b.squares,
            "norm": relative * b.norm,
            "scale": (relative + double) * b.scale,
        }


class KeepFiniteOp(Op):
    """KeepFinite of three arrays behind the face of an Op."""

    name = "keep_finite"
    updates = ("a0", "a1", "a2")

    def __init__(self, sizes: Sequence[int], dtype: DTypeLike) -> None:
        self.inputs = {f"a{i}": spec((size,), dtype) for i, size in enumerate(sizes)}
        self.inputs["scale"] = spec((1,), np.float64)
        self.outputs = {f"kept{i}": spec((size,), dtype) for i, size in enumerate(sizes)}
        self.workspace, self.flops = {}, 0

    def run(self, device: Device, b: Buffers) -> None:
        arrays = [b.a0, b.a1, b.a2]
        keep = KeepFinite(device, arrays)
        for array in arrays:
            device.write(array, array.dtype.type(0))  # a step has begun
        keep(b.scale)
        for target, kept in zip((b.kept0, b.kept1, b.kept2), keep.kept, strict=True):
            device.write(target, kept)

    def reference(self, b: Buffers) -> None:
        for array, kept in ((b.a0, b.kept0), (b.a1, b.kept1), (b.a2, b.kept2)):
            kept[...] = array if np.isnan(b.scale[0]) else 0
            array[...] = kept


class KeepFiniteRow(ArraysRow):
    """Arrays of different sizes after a step that went well, and after one that did not."""

    name, op, exact = "keep_finite", KeepFiniteOp, True
    more: ClassVar = {"gradients that are not finite": ((5, CHUNK + 1, 7), {"scale": np.nan})}

    def random_numbers(self, rng: np.random.Generator) -> dict[str, float]:
        return {"scale": float(rng.choice([0.5, np.nan]))}


ROWS = SgdRow(), SgdPackRow(), GradientNormRow(), KeepFiniteRow()
