"""Rows of the optimiser: its step, and the norm of the gradients that it clips by."""

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.cases import Bounds, Case, Inputs, Row
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
    updates = ("w0", "w1", "w2", "m0", "m1", "m2")
    RATES, DECAYS, MOMENTUM = (1.0, 2.0, 0.5), (5e-4, 0.0, 1e-2), 0.9

    def __init__(self, sizes: tuple[int, int, int], dtype: DTypeLike) -> None:
        self.inputs = {f"{kind}{i}": spec((size,), dtype) for kind in "wgm" for i, size in enumerate(sizes)}
        self.inputs |= {"lr": spec((1,), np.float64), "scale": spec((1,), np.float64)}
        self.outputs = {}
        self.workspace = {}
        self.flops = 7 * sum(sizes)

    def run(self, device: Device, b: Buffers) -> None:
        w, g, m = self._arrays(b)
        SgdStep(device, w, m, self.RATES, self.DECAYS, self.MOMENTUM)(g, b.lr, b.scale)

    def reference(self, b: Buffers) -> None:
        for w, g, m, rate, decay in zip(*self._arrays(b), self.RATES, self.DECAYS, strict=True):
            if np.isnan(b.scale[0]):
                continue
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


def _random_sizes(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(k) for k in rng.integers(1, 3 * CHUNK, 3))


class SgdRow(Row):
    """A step over parameters of different sizes."""

    name = "sgd_step"
    op = SgdOp
    typed = False  # SgdStep, which is no Op, looks at the arrays themselves

    def cases(self) -> list[Case]:
        cases = [Case(reason, {"sizes": s, "lr": 0.1, "scale": 1.0}) for reason, s in SIZES.items()]
        more = {"gradients scaled": 0.3, "gradients that are not finite": np.nan}
        return [
            *cases,
            *(Case(reason, {"sizes": (5, 300, 7), "lr": 0.1, "scale": scale}) for reason, scale in more.items()),
        ]

    def random_case(self, rng: np.random.Generator) -> Case:
        sizes, scale = _random_sizes(rng), float(rng.choice([1.0, rng.uniform(0, 1)]))
        return Case("random", {"sizes": sizes, "lr": float(10 ** rng.uniform(-5, 0)), "scale": scale})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return SgdOp(case["sizes"], dtype)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        numbers = {name: np.array([case[name]]) for name in ("lr", "scale")}
        return {**super().inputs(op, case, rng, integers), **numbers}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        bounds: Bounds = {}
        for i, (rate, decay) in enumerate(zip(SgdOp.RATES, SgdOp.DECAYS, strict=True)):
            w, g, m = (np.abs(getattr(b, f"{kind}{i}")) for kind in "wgm")
            g = np.nan_to_num(b.scale[0]) * g
            bounds[f"m{i}"] = 4 * eps * (m + g + decay * w)
            bounds[f"w{i}"] = 4 * eps * (w + rate * b.lr[0] * (m + g + decay * w))
        return bounds


class SgdPackOp(Op):
    """SgdPackStep for a weight with copies, a vector and a weight with a flipped copy alone, as an Op."""

    name = "sgd_pack_step"
    updates = ("w0", "w1", "w2", "m0", "m1", "m2", "copy0", "flipped0", "flipped2")
    RATES, DECAYS, MOMENTUM = SgdOp.RATES, SgdOp.DECAYS, SgdOp.MOMENTUM

    def __init__(self, o: int, kernel: int, c: int, padding: int, storage: DTypeLike) -> None:
        # For the reference everything is float64.
        self.storage = np.dtype(storage)
        master = np.float64 if storage == np.float64 else np.float32
        shapes = (o, kernel, kernel, c), (o,), (c, kernel, kernel, o)
        self.inputs = {f"{kind}{i}": spec(shape, master) for kind in "wgm" for i, shape in enumerate(shapes)}
        self.inputs |= {
            "copy0": spec((o + padding, kernel, kernel, c), storage),
            "flipped0": spec((c, kernel, kernel, o + padding), storage),
            "flipped2": spec((o, kernel, kernel, c), storage),
            "lr": spec((1,), np.float64),
            "scale": spec((1,), np.float64),
        }
        self.outputs, self.workspace, self.flops = {}, {}, 7 * sum(int(np.prod(shape)) for shape in shapes)

    def run(self, device: Device, b: Buffers) -> None:
        w, g, m = SgdOp._arrays(b)
        copies = (b.copy0, None, None), (b.flipped0, None, b.flipped2)
        step = SgdPackStep(device, w, m, self.RATES, self.DECAYS, self.MOMENTUM, *copies, self.storage)
        step(g, b.lr, b.scale)

    def reference(self, b: Buffers) -> None:
        w, g, m = SgdOp._arrays(b)
        if np.isnan(b.scale[0]):
            return
        for i in range(3):
            m[i][...] = self.MOMENTUM * m[i] + b.scale[0] * g[i] + self.DECAYS[i] * w[i]
            w[i][...] = w[i] - self.RATES[i] * b.lr[0] * m[i]
        o, k = len(w[0]), w[0].shape[1]
        b.copy0[:o] = w[0]
        for y in range(k):
            for x in range(k):
                b.flipped0[:, k - 1 - y, k - 1 - x, :o] = w[0][:, y, x].T
                b.flipped2[:, k - 1 - y, k - 1 - x] = w[2][:, y, x].T


class SgdPackRow(Row):
    """A step with copies in float32 or bfloat16. What lies beyond the outputs stays as it was."""

    name = "sgd_pack_step"
    op = SgdPackOp
    elements = (np.dtype(np.float32), BFLOAT16)
    typed = False

    def cases(self) -> list[Case]:
        sizes = {
            "size 1": (1, 1, 1, 0),
            "no padding": (8, 3, 4, 0),
            "the classifier of SegNet": (21, 3, 64, 3),
            "a tile and one off": (31, 3, 33, 1),
            "whole tiles": (32, 1, 64, 0),
            "many tiles": (65, 3, 70, 7),
            "SegNet-Basic": (4, 7, 3, 4),
        }
        return [
            *(
                Case(reason, {"weight": s, "lr": 0.1, "scale": 1.0 - 0.1 * i})
                for i, (reason, s) in enumerate(sizes.items())
            ),
            Case("gradients that are not finite", {"weight": (33, 3, 4, 7), "lr": 0.1, "scale": np.nan}),
        ]

    def random_case(self, rng: np.random.Generator) -> Case:
        o, c, padding = (int(k) for k in rng.integers((1, 1, 0), (70, 70, 8)))
        return Case("random", {"weight": (o, int(rng.choice([1, 3, 5])), c, padding), "lr": 0.01, "scale": 0.5})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        o, kernel, c, padding = case["weight"]
        return SgdPackOp(o, kernel, c, padding, dtype)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        numbers = {name: np.array([case[name]]) for name in ("lr", "scale")}
        return {**super().inputs(op, case, rng, integers), **numbers}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        bounds = SgdRow().bound(op, b, eps)
        o = len(b.w0)
        w0, w2 = np.asarray(bounds["w0"]), np.asarray(bounds["w2"])
        copy0, flipped0 = np.zeros(b.copy0.shape), np.zeros(b.flipped0.shape)
        copy0[:o] = w0
        flipped0[..., :o] = w0[:, ::-1, ::-1].transpose(3, 1, 2, 0)
        return {**bounds, "copy0": copy0, "flipped0": flipped0, "flipped2": w2[:, ::-1, ::-1].transpose(3, 1, 2, 0)}


class GradientNormOp(Op):
    """GradientNorm of three gradients behind the face of an Op."""

    name = "gradient_norm"
    updates = ("scale",)

    def __init__(self, sizes: tuple[int, int, int], largest: float, dtype: DTypeLike) -> None:
        self.largest = largest
        self.inputs = {f"g{i}": spec((size,), dtype) for i, size in enumerate(sizes)}
        for name, gradient in self.inputs.items():
            expect_float(self.name, name, gradient)
        self.inputs["scale"] = spec((1,), np.float64)
        self.outputs = {name: spec((size,), np.float64) for name, size in (("squares", 3), ("norm", 1))}
        self.workspace = {"partials": spec((len(chunks_of(sizes)),), np.float64)}
        self.flops = 2 * sum(sizes)

    def run(self, device: Device, b: Buffers) -> None:
        gradients = self._arrays(b)
        # The numpy device takes no workspace, and a call that allocates its arrays gives it none.
        partials = b.partials if hasattr(b, "partials") else device.empty(self.workspace["partials"].shape, np.float64)
        outputs = {"squares": b.squares, "norm": b.norm, "scale": b.scale, "partials": partials}
        GradientNorm(device, gradients, self.largest, **outputs)(gradients)

    def reference(self, b: Buffers) -> None:
        b.squares[...] = [(g.astype(np.float64) ** 2).sum() for g in self._arrays(b)]
        b.norm[...] = np.sqrt(b.squares.sum())
        b.scale[...] = min(1, self.largest / b.norm[0]) if b.norm[0] > 0 else 1

    @staticmethod
    def _arrays(b: Buffers) -> list[Array]:
        return [b.g0, b.g1, b.g2]


class GradientNormRow(Row):
    """Gradients of different sizes, clipped and not. Squares of integers add up exactly."""

    name = "gradient_norm"
    op = GradientNormOp
    exact = True

    def cases(self) -> list[Case]:
        cases = [Case(reason, {"sizes": s, "largest": 10.0, "magnitude": 1.0}) for reason, s in SIZES.items()]
        return [
            *cases,
            Case("nothing to clip", {"sizes": (5, 300, 7), "largest": 1e9, "magnitude": 1.0}),
            Case("all zero", {"sizes": (5, 300, 7), "largest": 1.0, "magnitude": 0.0}),
            Case("squares beyond float32", {"sizes": (5, 300, 7), "largest": 1.0, "magnitude": 1e25}),
            Case("squares below float32", {"sizes": (5, 300, 7), "largest": 1e-25, "magnitude": 1e-25}),
        ]

    def random_case(self, rng: np.random.Generator) -> Case:
        largest, size = (float(10 ** rng.uniform(-3, 3)) for _ in range(2))
        return Case("random", {"sizes": _random_sizes(rng), "largest": largest, "magnitude": size})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return GradientNormOp(case["sizes"], case["largest"], dtype)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        size = 1 if integers else case["magnitude"]
        gradients = super().inputs(op, case, rng, integers)
        scaled = {name: g * g.dtype.type(size) for name, g in gradients.items() if g is not None}
        return {**scaled, "scale": np.ones(1)}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # The outputs are doubles whatever the gradients are. Terms of one sign: relative errors add up at most.
        double = float(np.finfo(np.float64).eps)
        squares = double * np.array([b.g0.size, b.g1.size, b.g2.size]) * b.squares
        relative = double * (b.g0.size + b.g1.size + b.g2.size + 2)
        return {"squares": squares, "norm": relative * b.norm, "scale": (relative + double) * b.scale}


class KeepFiniteOp(Op):
    """KeepFinite of three arrays behind the face of an Op."""

    name = "keep_finite"
    updates = ("a0", "a1", "a2")

    def __init__(self, sizes: tuple[int, int, int], dtype: DTypeLike) -> None:
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
        for i in range(3):
            array, kept = getattr(b, f"a{i}"), getattr(b, f"kept{i}")
            kept[...] = array if np.isnan(b.scale[0]) else 0
            array[...] = kept


class KeepFiniteRow(Row):
    """Arrays of different sizes after a step that went well, and after one that did not."""

    name = "keep_finite"
    op = KeepFiniteOp
    exact = True
    typed = False

    def cases(self) -> list[Case]:
        cases = [Case(reason, {"sizes": s, "scale": 1.0}) for reason, s in SIZES.items()]
        return [*cases, Case("gradients that are not finite", {"sizes": (5, CHUNK + 1, 7), "scale": np.nan})]

    def random_case(self, rng: np.random.Generator) -> Case:
        return Case("random", {"sizes": _random_sizes(rng), "scale": float(rng.choice([0.5, np.nan]))})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return KeepFiniteOp(case["sizes"], dtype)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        return {**super().inputs(op, case, rng, integers), "scale": np.array([case["scale"]])}
