"""The op table: one row for each op (and each rung of its ladder), read by tests, fuzzing, profiler and benchmarks.

A row says which shapes an op must get right and why each is there, how to make its inputs, and how far a result may
lie from the reference evaluated in float64. Everything else (outputs, workspace, FLOPs) comes from the op's plan.

Error bounds have the form  c * eps * growth(K) * (sum of absolute terms),  K the length of the sum behind an output.
In the worst case growth(K) is K (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1); rounding
errors of mixed sign make it sqrt(K) in practice (section 2.8), so that is what the rows use, with c between 2 and 8
for the other roundings on the way. An op without sums has bound 0: every bit must be right.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.cpu import winograd
from segnet_scratch.device import Array, Device
from segnet_scratch.ops.add import AddForward
from segnet_scratch.ops.argmax import ArgmaxForward
from segnet_scratch.ops.batch_norm import BatchNormBackward, BatchNormEvaluationForward, BatchNormTrainingForward
from segnet_scratch.ops.confusion import ConfusionAccumulate
from segnet_scratch.ops.conv2d import Conv2dBackwardBias, Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
from segnet_scratch.ops.cross_entropy import VOID, CrossEntropyBackward, CrossEntropyForward
from segnet_scratch.ops.dropout import DropoutForward
from segnet_scratch.ops.max_pool import MaxPoolBackward, MaxPoolForward
from segnet_scratch.ops.max_unpool import MaxUnpoolBackward, MaxUnpoolForward
from segnet_scratch.ops.op import Buffers, Op, Spec, spec
from segnet_scratch.ops.relu import ReluBackward, ReluForward
from segnet_scratch.ops.resize_bilinear import ResizeBilinearForward
from segnet_scratch.ops.sgd import CHUNK, SgdStep
from segnet_scratch.ops.windows import CODE, valid_codes, windows_of

Inputs = dict[str, np.ndarray | None]
Bounds = dict[str, np.ndarray | float]


@dataclass(frozen=True)
class Case:
    """The sizes and options of one run of an op, and why they are there."""

    reason: str
    sizes: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.sizes[name]

    def __str__(self) -> str:
        return " ".join(f"{k}={v}".replace(" ", "") for k, v in self.sizes.items()) + f" ({self.reason})"


class Row:
    """One op: its cases, its inputs and its error bound. Subclasses fill in what differs from op to op."""

    name: str
    op: type[Op]
    exact: ClassVar[bool] = False  # integer-valued inputs give exactly the reference's result

    def cases(self) -> list[Case]:
        """The shapes that must work, each with its reason."""
        raise NotImplementedError

    def random_case(self, rng: np.random.Generator) -> Case:
        """A case that nobody has thought of."""
        raise NotImplementedError

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        """The op of a case, for arrays of this element type."""
        raise NotImplementedError

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        """An array for each input of the op: normally distributed, or integers from -4 to 4."""
        return {name: values(rng, s, integers) for name, s in op.inputs.items()}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        """The largest allowed error of each output; an output that is not named must be exact.

        `op` is planned for float64, `b` holds its inputs as they were and the reference's outputs, `eps` belongs to
        the element type that is checked.
        """
        return {}

    def generator(self, seed: int, index: int) -> np.random.Generator:
        """Random numbers for the `index`-th case of this row."""
        return np.random.default_rng([seed, zlib.crc32(self.name.encode()), index])


def values(rng: np.random.Generator, s: Spec, integers: bool = False) -> np.ndarray:
    """An array of this Spec: standard normal, or integers from -4 to 4 so that short sums are exact."""
    array = rng.integers(-4, 5, s.shape) if integers else rng.standard_normal(s.shape)
    return array.astype(s.dtype)


def empty_outputs(op: Op) -> dict[str, np.ndarray]:
    """NumPy arrays for the outputs of an op."""
    return {name: np.empty(s.shape, s.dtype) for name, s in op.outputs.items()}


def _of_magnitudes(op: Op, b: Buffers) -> Buffers:
    """The outputs of the reference for the absolute values of the inputs: for a linear op, sums of absolute terms."""
    arrays = {name: getattr(b, name) for name in op.inputs}
    magnitudes = Buffers(**{k: None if a is None else np.abs(a) for k, a in arrays.items()}, **empty_outputs(op))
    op.reference(magnitudes)
    return magnitudes


def _maps(shapes: Mapping[str, tuple[int, ...]], **options: Any) -> list[Case]:
    return [Case(reason, {"x": shape, **options}) for reason, shape in shapes.items()]


# Maps (n, h, w, c) for ops that treat each element, or each window, by itself.
MAPS: dict[str, tuple[int, ...]] = {
    "size 1": (1, 1, 1, 1),
    "one pixel, several channels": (1, 1, 1, 5),
    "one row": (1, 1, 8, 3),
    "one column": (2, 9, 1, 2),
    "even": (2, 4, 6, 4),
    "odd height and width": (1, 5, 7, 3),
    "primes": (3, 13, 11, 17),
    "one element less than a block of 256": (1, 5, 17, 3),
    "a block of 256": (1, 8, 8, 4),
    "one element more than a block": (1, 1, 257, 1),
    "channels of SegNet's classifier": (2, 6, 5, 21),
    "deepest map of SegNet": (1, 2, 3, 512),
}

# Maps for sums over n, h, w: common/columns.cuh has blocks of 32 channels x 8 rows and chunks of at least 64 rows.
COLUMN_MAPS: dict[str, tuple[int, ...]] = {
    "two rows": (2, 1, 1, 1),
    "a row less than the row lanes": (1, 7, 1, 31),
    "as many rows as row lanes": (1, 8, 1, 32),
    "a row more than the row lanes": (1, 3, 3, 33),
    "a row less than a chunk": (1, 7, 9, 5),
    "one chunk": (1, 8, 8, 4),
    "a second chunk of one row": (1, 5, 13, 3),
    "primes": (3, 13, 11, 17),
    "one pixel an image": (9, 1, 1, 64),
    "more channels than threads in the merge": (1, 2, 3, 257),
    "rows that need longer chunks than 64": (1, 1, 32769, 1),
    "a map of SegNet": (2, 24, 32, 16),
}


def _random_map(rng: np.random.Generator, channels: int = 40) -> tuple[int, ...]:
    n, h, w, c = rng.integers(1, (4, 18, 18, channels + 1))
    return int(n), int(h), int(w), int(c)


# ------------------------------------------------------------------------------------------------ convolution


def _conv(reason: str, x: tuple[int, ...], o: int, kernel: tuple[int, int], padding: int = 0, stride: int = 1) -> Case:
    return Case(reason, {"x": x, "o": o, "kernel": kernel, "padding": padding, "stride": stride, "bias": o % 2 == 1})


CONVOLUTIONS = [
    _conv("size 1", (1, 1, 1, 1), 1, (1, 1)),
    _conv("one pixel: every tap but one is outside", (1, 1, 1, 3), 2, (3, 3), 1),
    _conv("one row", (1, 1, 9, 2), 3, (3, 3), 1),
    _conv("odd sizes", (1, 5, 7, 3), 5, (3, 3), 1),
    _conv("primes", (2, 13, 11, 17), 19, (3, 3), 1),
    _conv("no padding", (2, 6, 5, 4), 3, (3, 3)),
    _conv("even kernel", (1, 4, 6, 8), 8, (2, 2), 1),
    _conv("kernel wider than high", (1, 6, 5, 2), 3, (2, 5), 2),
    _conv("kernel as large as the padded image", (2, 3, 3, 4), 3, (5, 5), 1),
    _conv("padding wider than the kernel", (1, 3, 4, 2), 3, (2, 2), 3),
    _conv("first layer of SegNet", (1, 12, 10, 3), 64, (3, 3), 1),
    _conv("classifier of SegNet", (1, 9, 8, 64), 21, (3, 3), 1),
    _conv("SegNet-Basic", (1, 10, 9, 6), 7, (7, 7), 3),
    _conv("enough channels for Winograd's tiles", (1, 7, 6, 32), 33, (3, 3), 1),
    _conv("Winograd's tiles beyond the image", (1, 5, 5, 33), 32, (3, 3), 3),
]
STRIDED = [
    _conv("stride 2", (2, 9, 7, 3), 4, (3, 3), 1, stride=2),
    _conv("stride 2 that leaves the last row over", (1, 8, 6, 3), 5, (3, 3), 0, stride=2),
    _conv("stride larger than the kernel: pixels without gradient", (1, 10, 8, 2), 3, (2, 2), 1, stride=3),
]
# Tiles of cuda/conv2d_tiled.cu: 128 rows x 64 columns x depth 16. Rows, columns and depth of the matrix product are
# (pixels, o, kernel c) in fprop, (pixels, c, kernel o) in dgrad and (kernel c, o, pixels) in wgrad.
TILES = [
    *(_conv(f"tile{d:+d} of fprop", (1, 1, 128 + d, 16 + d), 64 + d, (1, 1)) for d in (-1, 0, 1)),
    *(_conv(f"tile{d:+d} of dgrad", (1, 1, 128 + d, 64 + d), 16 + d, (1, 1)) for d in (-1, 0, 1)),
    *(_conv(f"tile{d:+d} of wgrad", (1, 1, 16 + d, 128 + d), 64 + d, (1, 1)) for d in (-1, 0, 1)),
    *(_conv(f"{2048 + d} pixels: chunks of wgrad", (1, 1, 2048 + d, 2), 3, (1, 1)) for d in (0, 1)),
]


class Conv2dRow(Row):
    """fprop, dgrad or wgrad in one rung; `terms` is the length of the sum behind an output."""

    exact = True

    def __init__(self, op: type[Op], rung: str, terms: Callable[[Any], int]) -> None:
        self.op, self.rung, self.terms = op, rung, terms
        self.name = f"{op.name}_{rung}"

    def cases(self) -> list[Case]:
        return CONVOLUTIONS + (STRIDED if self.rung == "direct" else TILES)

    def random_case(self, rng: np.random.Generator) -> Case:
        kh, kw = (int(k) for k in rng.choice([1, 2, 3, 3, 3, 5, 7], 2))
        stride = 1 if self.rung == "tiled" else int(rng.integers(1, 4))
        n, h, w, c = _random_map(rng)
        padding = int(rng.integers(0, max(kh, kw) + 1))
        padding = max(padding, -(-(max(kh - h, kw - w)) // 2))
        return _conv("random", (n, h, w, c), int(rng.integers(1, 80)), (kh, kw), padding, stride)

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        weight = spec((case["o"], *case["kernel"], case["x"][3]), dtype)
        return self.op.plan(spec(case["x"], dtype), weight, case["stride"], case["padding"], self.rung)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        if "bias" in arrays and not case["bias"]:
            arrays["bias"] = None
        return arrays

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # c = 2: one rounding a term, and twice the error of direct summation where NumPy takes Winograd's way.
        g = op.geometry  # type: ignore[attr-defined]
        magnitudes = _of_magnitudes(op, b)
        (output,) = op.outputs
        terms = getattr(magnitudes, output)
        if winograd.suits((g.kh, g.kw), g.stride, g.c, g.o):
            terms = _largest_neighbour(terms)  # what is rounded belongs to a tile, not to one output
        return {output: 2 * eps * sqrt(self.terms(g)) * terms}


def _largest_neighbour(a: np.ndarray) -> np.ndarray:
    """For each position of the two middle axes the maximum over the 3x3 positions around it."""
    padded = np.pad(a, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = a.shape[1:3]
    return np.max([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


class Conv2dBackwardBiasRow(Row):
    """Gradient of the bias; the same kernels serve every rung."""

    name = "conv2d_backward_bias"
    op = Conv2dBackwardBias
    exact = True

    def cases(self) -> list[Case]:
        return _maps({"size 1": (1, 1, 1, 1), **COLUMN_MAPS})

    def random_case(self, rng: np.random.Generator) -> Case:
        return Case("random", {"x": _random_map(rng, 80)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return Conv2dBackwardBias.plan(spec(case["x"], dtype))

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"dbias": 2 * eps * sqrt(b.dy.size / b.dbias.size) * _of_magnitudes(op, b).dbias}


# ------------------------------------------------------------------------------------------------ batch norm


class BatchNormRow(Row):
    """What the three ops share. `offset` is the mean of x in units of its standard deviation."""

    def cases(self) -> list[Case]:
        return [
            *_maps(COLUMN_MAPS, offset=1.0, scale=1.0),
            Case(
                "mean 1000 times the deviation: E[x^2] - E[x]^2 would cancel",
                {"x": (2, 9, 9, 7), "offset": 1e3, "scale": 1.0},
            ),
            Case("constant channels: variance 0", {"x": (2, 5, 5, 3), "offset": 3.0, "scale": 0.0}),
            Case("variance far below eps", {"x": (2, 5, 5, 3), "offset": 0.0, "scale": 1e-4}),
            Case("large values", {"x": (1, 6, 5, 4), "offset": 1.0, "scale": 1e4}),
        ]

    def random_case(self, rng: np.random.Generator) -> Case:
        n, h, w, c = _random_map(rng, 80)
        return Case("random", {"x": (n + 1, h, w, c), "offset": float(rng.choice([0, 1, 30])), "scale": 1.0})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec(case["x"], dtype))

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        x, dtype = arrays["x"], op.inputs["x"].dtype
        assert x is not None
        offsets = case["offset"] * (max(case["scale"], 0.1) * rng.choice([-1, 1], x.shape[3]) + 0.1)
        arrays["x"] = x = (x * case["scale"] + offsets).astype(dtype)
        if "running_var" in arrays:
            arrays["running_var"] = rng.uniform(0.1, 4, x.shape[3]).astype(dtype)
        if "inv_std" in arrays:
            mean = x.mean((0, 1, 2), dtype=np.float64)
            arrays["mean"] = mean.astype(dtype)
            arrays["inv_std"] = (1 / np.sqrt(((x - mean) ** 2).mean((0, 1, 2)) + 1e-5)).astype(dtype)
        return arrays


class BatchNormTrainingRow(BatchNormRow):
    """Training: errors of the statistics are carried through to y."""

    name = "batch_norm_training_forward"
    op = BatchNormTrainingForward

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        rows, momentum = b.x.size / b.mean.size, op.momentum  # type: ignore[attr-defined]
        # A mean errs by its sum of absolute terms, a variance merged as (count, mean, M2) relatively by the condition
        # number kappa = rms / deviation (Chan, Golub, LeVeque 1983, table 2); squared where the mean itself errs. That
        # is for NumPy, which sums the pixels of a chunk in their own type; the kernels sum in double.
        unit = 2 * eps * sqrt(rows)
        rms = np.sqrt((b.x**2).mean((0, 1, 2)))
        variance = b.x.var((0, 1, 2))
        d_mean = unit * rms
        d_variance = unit * (variance + rms * np.sqrt(variance)) + d_mean**2
        d_scale = d_variance * b.inv_std**2 / 2 + 4 * eps  # relative error of inv_std
        centred = np.abs(b.x - b.mean)
        gain = np.abs(b.weight) * b.inv_std
        return {
            "y": gain * (d_mean + centred * (d_scale + 4 * eps)) + 2 * eps * np.abs(b.bias),
            "mean": d_mean,
            "inv_std": d_scale * b.inv_std,
            "running_mean": momentum * d_mean + 4 * eps * (np.abs(b.running_mean) + momentum * rms),
            "running_var": momentum * rows / (rows - 1) * d_variance + 4 * eps * b.running_var,
        }


class BatchNormEvaluationRow(BatchNormRow):
    """Evaluation: element by element."""

    name = "batch_norm_evaluation_forward"
    op = BatchNormEvaluationForward

    def cases(self) -> list[Case]:
        return [
            *_maps({"size 1: one value a channel is enough here": (1, 1, 1, 1)}, offset=0.0, scale=1.0),
            *super().cases(),
        ]

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        normalised = np.abs(b.x - b.mean) * b.inv_std * np.abs(b.weight)
        return {"y": 4 * eps * (normalised + np.abs(b.bias)), "inv_std": 4 * eps * b.inv_std}


class BatchNormBackwardRow(BatchNormRow):
    """Backward of both modes."""

    op = BatchNormBackward

    def __init__(self, training: bool) -> None:
        self.training = training
        self.name = f"batch_norm_backward_{'training' if training else 'evaluation'}"

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return BatchNormBackward.plan(spec(case["x"], dtype), self.training)

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        rows, axes = b.x.size / b.mean.size, (0, 1, 2)
        xhat, dy = np.abs(b.x - b.mean) * b.inv_std, np.abs(b.dy)
        unit = 4 * eps * sqrt(rows)
        sum_dy, sum_dy_xhat = dy.sum(axes), (dy * xhat).sum(axes)
        dx = 4 * eps * dy
        if self.training:
            dx = dx + unit * (sum_dy + xhat * sum_dy_xhat) / rows
        return {"dx": np.abs(b.weight) * b.inv_std * dx, "dweight": unit * sum_dy_xhat, "dbias": unit * sum_dy}


# ------------------------------------------------------------------------------------------------ element by element


class MapRow(Row):
    """Ops on one map, without sums unless `bound` says otherwise; `options` are further arguments of the plan."""

    exact = True

    def __init__(self, op: type[Op], *options: Any) -> None:
        self.op, self.name, self.options = op, op.name, options

    def cases(self) -> list[Case]:
        return _maps(MAPS)

    def random_case(self, rng: np.random.Generator) -> Case:
        return Case("random", {"x": _random_map(rng)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec(case["x"], dtype), *self.options)


class AddRow(MapRow):
    """One rounding."""

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"y": eps * np.abs(b.y)}


class DropoutRow(MapRow):
    """The mask must agree in every element; y has the roundings of 1 - p, of the division and of the product."""

    exact = False

    def cases(self) -> list[Case]:
        probabilities = (0.5, 0.0, 0.25, 0.875)
        sizes = {f"{k} elements: groups of four": (2, k) for k in (1, 3, 4, 5, 1023, 1025)}
        return [
            Case(reason, {"x": x, "p": probabilities[i % 4], "layer": i, "seed": 2**40 + i, "step": i * 1001})
            for i, (reason, x) in enumerate({**sizes, **MAPS}.items())
        ]

    def random_case(self, rng: np.random.Generator) -> Case:
        p = float(np.float32(rng.uniform(0, 0.95)))
        seed, step, layer = (int(k) for k in rng.integers((2**62, 2**31, 30)))
        return Case("random", {"x": _random_map(rng), "p": p, "layer": layer, "seed": seed, "step": step})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return DropoutForward.plan(spec(case["x"], dtype), case["p"], case["layer"])

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        state = np.array([case["seed"], case["step"]], np.uint64)
        return {"x": values(rng, op.inputs["x"], integers), "state": state}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"y": 2 * eps * np.abs(b.y)}


# ------------------------------------------------------------------------------------------------ pooling


class WindowRow(MapRow):
    """Backward of the pool, and both directions of the unpool: values move to or from valid positions."""

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        n, h, w, c = case["x"]
        windows = spec(windows_of(n, h, w, c), dtype)
        if self.op is MaxPoolBackward:
            return MaxPoolBackward.plan(windows, (h, w))
        if self.op is MaxUnpoolForward:
            return MaxUnpoolForward.plan(windows, Spec(windows.shape, CODE), (h, w))
        return MaxUnpoolBackward.plan(spec(case["x"], dtype))

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = {name: values(rng, s, integers) for name, s in op.inputs.items() if name != "codes"}
        codes = rng.integers(0, 4, op.inputs["codes"].shape, CODE)
        return {**arrays, "codes": valid_codes(codes, case["x"][1:3])}


# ------------------------------------------------------------------------------------------------ loss and scores


class CrossEntropyRow(Row):
    """Forward or backward, in one normalisation."""

    def __init__(self, op: type[Op], normalisation: str) -> None:
        self.op, self.normalisation = op, normalisation
        self.name = f"{op.name}_{normalisation}"

    def cases(self) -> list[Case]:
        sizes = {
            "size 1": (1, 1),
            "one pixel": (1, 21),
            "a pixel less than a block": (255, 2),
            "a block of pixels": (256, 3),
            "a pixel more than a block": (257, 21),
            "primes": (1009, 11),
            "most classes": (100, 255),
            "more pixels than the grid has threads": (262145, 2),
        }
        cases = [self._case(reason, *size, weighted=i % 2 == 1) for i, (reason, size) in enumerate(sizes.items())]
        return [
            *cases,
            self._case("void alone", 300, 4, void=1.0, weighted=True),
            self._case("no void", 300, 4, void=0.0),
            self._case("logits of +-1e4", 500, 21, scale=1e4),
            self._case("equal logits", 500, 21, scale=0.0, weighted=True),
        ]

    def _case(
        self, reason: str, pixels: int, classes: int, void: float = 0.2, scale: float = 3.0, weighted: bool = False
    ) -> Case:
        sizes = {"pixels": pixels, "classes": classes, "void": void, "scale": scale, "weighted": weighted}
        return Case(reason, sizes)

    def random_case(self, rng: np.random.Generator) -> Case:
        pixels, classes = int(rng.integers(1, 2000)), int(rng.integers(1, 60))
        scale = float(rng.choice([0.1, 3, 100]))
        return self._case("random", pixels, classes, float(rng.uniform(0, 1)), scale, bool(rng.integers(2)))

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec((case["pixels"], case["classes"]), dtype), self.normalisation)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        logits, classes = op.inputs["logits"], case["classes"]
        labels = rng.integers(0, classes, case["pixels"], np.uint8)
        labels[rng.random(case["pixels"]) < case["void"]] = VOID
        weights = rng.uniform(0.1, 3, classes).astype(logits.dtype) if case["weighted"] else None
        x = np.clip(values(rng, logits, integers) * case["scale"], -1e4, 1e4).astype(logits.dtype)
        arrays: Inputs = {"logits": x, "labels": labels, "class_weights": weights}
        if self.op is CrossEntropyForward:
            return arrays
        forward = CrossEntropyForward.plan(logits, self.normalisation)
        sums = Buffers(**arrays, **empty_outputs(forward))
        forward.reference(sums)
        return {**arrays, "sums": sums.sums, "dloss": values(rng, op.inputs["dloss"])}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # With d = z - max z, exact but for one rounding: log sum exp(d) errs by sqrt(classes) + |d exp(d)| < 1, and
        # d[label] by itself; a softmax relatively by all of that.
        classes = b.logits.shape[1]
        d = b.logits - b.logits.max(axis=1, keepdims=True)
        exponentials = np.exp(d)
        log_sum = np.log(exponentials.sum(axis=1))
        valid = b.labels < classes
        labels = np.where(valid, b.labels, 0)
        weights = valid * (1.0 if b.class_weights is None else b.class_weights[labels])
        unit = 2 * eps * (sqrt(classes) + 1)
        normaliser = max(b.sums[2 if self.normalisation == "valid" else 1], 1e-30)
        if self.op is CrossEntropyForward:
            error = weights @ (unit + 2 * eps * (log_sum - np.take_along_axis(d, labels[:, None].astype(int), 1)[:, 0]))
            doubles = np.finfo(np.float64).eps * len(labels)  # the order of sums in double differs from NumPy's
            return {
                "sums": np.array([error + doubles * abs(b.sums[0]), doubles * b.sums[1], 0]),
                "loss": error / normaliser + 4 * eps * np.abs(b.loss),
            }
        softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
        hot = np.arange(classes) == labels[:, None]
        relative = unit + 2 * eps * (log_sum[:, None] - d)
        factor = weights * abs(b.dloss[0]) / normaliser
        return {"dlogits": factor[:, None] * (softmax * (relative + 2 * eps) + 2 * eps * hot)}


class ArgmaxRow(MapRow):
    """Up to 256 classes a pixel; integer logits have many ties."""

    def cases(self) -> list[Case]:
        sizes = {"one class": (3, 1), "two dimensions": (257, 21), "most classes": (10, 256), **MAPS}
        return [case for case in _maps(sizes) if case["x"][-1] <= 256]


class ConfusionRow(Row):
    """Counts of pairs; labels that are no class, void among them, are not counted."""

    name = "confusion_accumulate"
    op = ConfusionAccumulate
    exact = True

    def cases(self) -> list[Case]:
        sizes = {
            "size 1": (1, 1),
            "a pixel less than a block": (255, 21),
            "a block": (256, 21),
            "a pixel more": (257, 11),
            "most classes": (4099, 255),
            "few classes: many threads add to one count": (5000, 2),
        }
        return [Case(reason, {"pixels": p, "classes": k}) for reason, (p, k) in sizes.items()]

    def random_case(self, rng: np.random.Generator) -> Case:
        pixels, classes = rng.integers(1, (10000, 256))
        return Case("random", {"pixels": int(pixels), "classes": int(classes)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return ConfusionAccumulate.plan(case["pixels"], case["classes"])

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        pixels, classes = case["pixels"], case["classes"]
        truth, prediction = rng.integers(0, min(256, classes + 2), (2, pixels)).astype(np.uint8)
        truth[rng.random(pixels) < 0.1] = VOID
        return {
            "truth": truth,
            "prediction": prediction,
            "counts": rng.integers(0, 2**40, (classes, classes), np.uint64),
        }


class ResizeRow(Row):
    """Bilinear resize to `size`."""

    name = "resize_bilinear_forward"
    op = ResizeBilinearForward

    def cases(self) -> list[Case]:
        sizes: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
            "size 1": ((1, 1, 1, 1), (1, 1)),
            "one pixel spread out": ((1, 1, 1, 3), (5, 4)),
            "to one pixel": ((2, 6, 5, 2), (1, 1)),
            "equal sizes": ((1, 5, 7, 3), (5, 7)),
            "twice as large": ((2, 4, 6, 4), (8, 12)),
            "half as large": ((1, 8, 6, 3), (4, 3)),
            "primes": ((1, 13, 11, 17), (29, 23)),
            "from SegNet's input size to an image of VOC": ((1, 36, 48, 21), (50, 37)),
        }
        return [Case(reason, {"x": x, "size": size}) for reason, (x, size) in sizes.items()]

    def random_case(self, rng: np.random.Generator) -> Case:
        height, width = rng.integers(1, 40, 2)
        return Case("random", {"x": _random_map(rng), "size": (int(height), int(width))})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return ResizeBilinearForward.plan(spec(case["x"], dtype), case["size"])

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # A source position near h is rounded at eps h, and y changes by at most twice the largest value a pixel.
        positions = 1 + b.x.shape[1] + b.x.shape[2]
        return {"y": 4 * eps * positions * np.abs(b.x).max((1, 2), keepdims=True)}


# ------------------------------------------------------------------------------------------------ SGD


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


def _conv_rows(rung: str) -> list[Row]:
    return [
        Conv2dRow(Conv2dForward, rung, lambda g: g.depth + 1),
        Conv2dRow(Conv2dBackwardData, rung, lambda g: g.kh * g.kw * g.o),
        Conv2dRow(Conv2dBackwardWeight, rung, lambda g: g.pixels),
    ]


ROWS: tuple[Row, ...] = (
    *_conv_rows("direct"),
    *_conv_rows("tiled"),
    Conv2dBackwardBiasRow(),
    BatchNormTrainingRow(),
    BatchNormEvaluationRow(),
    BatchNormBackwardRow(training=True),
    BatchNormBackwardRow(training=False),
    MapRow(ReluForward),
    MapRow(ReluBackward),
    MapRow(MaxPoolForward),
    WindowRow(MaxPoolBackward),
    WindowRow(MaxUnpoolForward),
    WindowRow(MaxUnpoolBackward),
    DropoutRow(DropoutForward),
    *(CrossEntropyRow(op, n) for op in (CrossEntropyForward, CrossEntropyBackward) for n in ("weights", "valid")),
    ArgmaxRow(ArgmaxForward),
    ConfusionRow(),
    ResizeRow(),
    AddRow(AddForward),
    SgdRow(),
)
