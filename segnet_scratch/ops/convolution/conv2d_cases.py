"""Rows of the convolutions: fprop, dgrad and wgrad of each rung, the rungs that teach, and the gradient of the bias."""

from math import sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.cases import (
    COLUMN_MAPS,
    Bounds,
    Case,
    Inputs,
    MapRow,
    Refusal,
    Row,
    Shape,
    in_whole_pieces,
    of_magnitudes,
    random_map,
)
from segnet_scratch.ops.convolution import winograd
from segnet_scratch.ops.convolution.conv2d import (
    Conv2dBackwardBias,
    Conv2dBackwardData,
    Conv2dBackwardWeight,
    Conv2dForward,
)
from segnet_scratch.ops.convolution.conv2d_lessons import LESSONS, Conv2dLesson
from segnet_scratch.ops.op import Buffers, Op, Spec, spec
from segnet_scratch.runtime.precision import BFLOAT16, ELEMENTS_OF_RUNG, round_to_tf32


def conv_case(
    reason: str, x: tuple[int, ...], o: int, kernel: tuple[int, int], padding: int = 0, stride: int = 1
) -> Case:
    """A case of a convolution; odd numbers of outputs have a bias."""
    return Case(reason, {"x": x, "o": o, "kernel": kernel, "padding": padding, "stride": stride, "bias": o % 2 == 1})


CONVOLUTIONS = [
    conv_case("size 1", (1, 1, 1, 1), 1, (1, 1)),
    conv_case("one pixel: every tap but one is outside", (1, 1, 1, 3), 2, (3, 3), 1),
    conv_case("one row", (1, 1, 9, 2), 3, (3, 3), 1),
    conv_case("odd sizes", (1, 5, 7, 3), 5, (3, 3), 1),
    conv_case("primes", (2, 13, 11, 17), 19, (3, 3), 1),
    conv_case("no padding", (2, 6, 5, 4), 3, (3, 3)),
    conv_case("even kernel", (1, 4, 6, 8), 8, (2, 2), 1),
    conv_case("kernel wider than high", (1, 6, 5, 2), 3, (2, 5), 2),
    conv_case("kernel as large as the padded image", (2, 3, 3, 4), 3, (5, 5), 1),
    conv_case("padding wider than the kernel", (1, 3, 4, 2), 3, (2, 2), 3),
    conv_case("first layer of SegNet", (1, 12, 10, 3), 64, (3, 3), 1),
    conv_case("classifier of SegNet", (1, 9, 8, 64), 21, (3, 3), 1),
    conv_case("SegNet-Basic", (1, 10, 9, 6), 7, (7, 7), 3),
    conv_case("enough channels for Winograd's tiles", (1, 7, 6, 32), 33, (3, 3), 1),
    conv_case("Winograd's tiles beyond the image", (1, 5, 5, 33), 32, (3, 3), 3),
]
STRIDED = [
    conv_case("stride 2", (2, 9, 7, 3), 4, (3, 3), 1, stride=2),
    conv_case("stride 2 that leaves the last row over", (1, 8, 6, 3), 5, (3, 3), 0, stride=2),
    conv_case("stride larger than the kernel: pixels without gradient", (1, 10, 8, 2), 3, (2, 2), 1, stride=3),
]
# Tiles of cuda/conv2d_tiled.cu: 128 rows x 64 columns x depth 16. Rows, columns and depth of the matrix product are
# (pixels, o, kernel c) in fprop, (pixels, c, kernel o) in dgrad and (kernel c, o, pixels) in wgrad.
TILES = [
    *(conv_case(f"tile{d:+d} of fprop", (1, 1, 128 + d, 16 + d), 64 + d, (1, 1)) for d in (-1, 0, 1)),
    *(conv_case(f"tile{d:+d} of dgrad", (1, 1, 128 + d, 64 + d), 16 + d, (1, 1)) for d in (-1, 0, 1)),
    *(conv_case(f"tile{d:+d} of wgrad", (1, 1, 16 + d, 128 + d), 64 + d, (1, 1)) for d in (-1, 0, 1)),
    *(conv_case(f"{2048 + d} pixels: chunks of wgrad", (1, 1, 2048 + d, 2), 3, (1, 1)) for d in (0, 1)),
]


class Conv2dRow(Row):
    """fprop, dgrad or wgrad in one rung."""

    exact = True

    def cases(self) -> list[Case]:
        return CONVOLUTIONS + (STRIDED if self.rung == "direct" else TILES)

    def random_case(self, rng: np.random.Generator) -> Case:
        kh, kw = (int(k) for k in rng.choice([1, 2, 3, 3, 3, 5, 7], 2))
        stride = int(rng.integers(1, 4)) if self.rung == "direct" else 1
        n, h, w, c = random_map(rng)
        padding = int(rng.integers(0, max(kh, kw) + 1))
        padding = max(padding, -(-(max(kh - h, kw - w)) // 2))
        return conv_case("random", (n, h, w, c), int(rng.integers(1, 80)), (kh, kw), padding, stride)

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.planned(case, dtype, self.rung)

    def chosen(
        self, x: Shape, weight: Shape = (), stride: int = 1, padding: int = 1, bias: int = 1, rung: str = "default"
    ) -> Case:
        o, *kernel = weight[:3] or (3, 3, 3)
        options = {"stride": stride, "padding": padding, "bias": bias, "rung": None if rung == "default" else rung}
        return Case("chosen", {"x": x, "o": o, "kernel": tuple(kernel), **options})

    def planned(self, case: Case, dtype: DTypeLike, rung: str) -> Op:
        """The op of a case in any rung."""
        weight = spec((case["o"], *case["kernel"], case["x"][-1]), dtype)
        return self.op.plan(spec(case["x"], dtype), weight, case["stride"], case["padding"], rung)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        if "bias" in arrays and not case["bias"]:
            arrays["bias"] = None
        return arrays

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        growth = growth_of(self.rung, self.terms(op))
        return {output: growth * eps * terms for output, terms in self.magnitudes(op, b).items()}

    def terms(self, op: Op) -> int:
        """The length of the sum behind an output."""
        g = op.geometry  # type: ignore[attr-defined]
        if issubclass(self.op, Conv2dForward):
            return g.depth + 1
        return g.kh * g.kw * g.o if self.op is Conv2dBackwardData else g.pixels

    def magnitudes(self, op: Op, b: Buffers) -> dict[str, np.ndarray]:
        """The sum of the absolute terms of each element of the output."""
        g = op.geometry  # type: ignore[attr-defined]
        (output,) = op.outputs
        terms = getattr(of_magnitudes(op, b), output)
        channels, target = (g.o, g.x) if self.op is Conv2dBackwardData else (g.c, g.y)
        if winograd.suits((g.kh, g.kw), g.stride, channels, target):
            terms = _largest_neighbour(terms)  # what is rounded belongs to a tile, not to one output
        return {output: terms}

    def refusals(self) -> list[Refusal]:
        def x(*shape: int) -> dict[str, Spec]:
            return {"x": spec(shape, self.elements[0])}

        def weight(*shape: int, dtype: DTypeLike = self.elements[0]) -> dict[str, Spec]:
            return {"weight": spec(shape, dtype)}

        wrong: dict[str, tuple[Any, ...]] = {
            "three dimensions": ("channels last", x(4, 5, 3)),
            "empty": ("empty", x(0, 4, 5, 3)),
            "channels": ("has 2 channels", x(1, 4, 5, 2)),
            "weight of three dimensions": ("expected (o, kh, kw, c)", weight(2, 3, 3)),
            "stride 0": ("stride 0", {"stride": 0}),
            "padding below 0": ("padding -1", {"padding": -1}),
            "kernel too large": ("larger than the padded image 4x5", weight(2, 7, 3, 3)),
            "unknown rung": ("expected one of direct, tiled", {"rung": "fast"}),
            "two element types": ("weight has element type float64", weight(2, 3, 3, 3, dtype=np.float64), DTypeError),
        }
        if self.rung != "direct":
            wrong["stride 2"] = "use 'direct'", {"stride": 2}
        return self.refused(
            {**x(1, 4, 5, 3), **weight(2, 3, 3, 3), "stride": 1, "padding": 0, "rung": self.rung}, wrong
        )


def growth_of(rung: str, terms: int) -> float:
    """By how many eps a sum of so many products may be off, relative to the sum of their absolute values."""
    # c = 2: one rounding a term, and twice the error of direct summation where NumPy takes Winograd's way.
    # Tensor cores: twice that (TensorCoreRow), which the kernels of lessons keep with room to spare. In tf32x3 a
    # product lacks the rests of its factors and small * small, 2^-22 of it each, or 6 eps.
    return (2 if rung in ("direct", "tiled") else 4) * sqrt(terms) + 6 * (rung == "tf32x3")


def _largest_neighbour(a: np.ndarray) -> np.ndarray:
    """For each position of the two middle axes the maximum over the 3x3 positions around it."""
    padded = np.pad(a, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = a.shape[1:3]
    return np.max([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


class Conv2dBackwardBiasRow(MapRow):
    """Gradient of the bias; the same kernels serve every rung."""

    elements = (*Row.elements, BFLOAT16)
    shapes: ClassVar = {"size 1": (1, 1, 1, 1), **COLUMN_MAPS}
    most_channels = 80

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"dbias": 2 * eps * sqrt(b.dy.size / b.dbias.size) * of_magnitudes(op, b).dbias}

    def refusals(self) -> list[Refusal]:
        return self.refused({}, {"three dimensions": ("channels last", {"dy": spec((4, 5, 3))})})


OPS = (Conv2dForward, Conv2dBackwardData, Conv2dBackwardWeight)


# On tensor cores the reference sees the factors as they do, rounded to tf32 or as bfloat16, multiplies and adds them in
# float64. What remains is the float32 sum. In which order a tensor core adds is not documented, and it cuts bits off
# where others round, so a term costs up to eps and not eps / 2: the bound is twice that of the other rungs, 4 eps
# sqrt(K) times the sum of absolute products. It covers any order: nothing in the argument for sqrt(K) (ops/cases.py)
# depends on one.

# Blocks compute 128 rows x 32, 64 or 128 columns; a stage is 128 bytes of depth: 32 float32 or 64 bfloat16, in pieces
# of 4 or 8 numbers. Rows, columns, depth are (pixels, o, kernel c) in fprop, (pixels, c, kernel o) in dgrad and
# (kernel c, o, pixels) in wgrad. Multiples of 8 are whole pieces in each of them; other channels are copied one by one.
TENSOR_CORE_TILES = [
    *(conv_case(f"{p} pixels of a tile's 128", (1, 1, p, 32), 40, (1, 1)) for p in (127, 128, 129)),
    *(conv_case(f"{o} outputs: columns of the tiles", (1, 3, 5, 32), o, (1, 1)) for o in (31, 32, 33, 64, 65, 129)),
    *(conv_case(f"{o} outputs: a piece off the tiles", (1, 3, 5, 32), o, (1, 1)) for o in (24, 56, 72, 120, 136)),
    *(conv_case(f"{c} channels: depth and rows of the tiles", (1, 3, 5, c), 32, (1, 1)) for c in (63, 65, 129)),
    *(conv_case(f"{c} channels: a piece off the tiles", (1, 3, 5, c), 32, (1, 1)) for c in (24, 56, 72, 120, 136)),
    *(conv_case(f"{c} channels: stages of the pipeline", (1, 3, 5, c), 8, (1, 1)) for c in (64, 96, 160, 192)),
    *(conv_case(f"{p} pixels: depth of wgrad", (1, 1, p, 8), 8, (1, 1)) for p in (31, 33, 63, 64, 65, 97)),
    *(conv_case(f"{p} pixels: chunks of wgrad", (1, 1, p, 8), 16, (1, 1)) for p in (2048, 2049)),
    conv_case("one piece of channels: several taps in a stage", (1, 4, 5, 8), 8, (3, 3), 1),
    conv_case("half a piece of bfloat16", (1, 4, 5, 4), 12, (3, 3), 1),
    conv_case("stages that cut through taps", (2, 5, 6, 40), 48, (3, 3), 1),
    conv_case("one pixel with whole pieces", (1, 1, 1, 8), 8, (3, 3), 1),
    conv_case("many images in a tile", (30, 2, 3, 8), 16, (3, 3), 1),
    conv_case("kernel larger than the image, whole pieces", (2, 3, 3, 8), 8, (5, 5), 1),
    conv_case("padding wider than the kernel, whole pieces", (1, 3, 4, 8), 8, (2, 2), 3),
    conv_case("the largest kernel", (1, 9, 8, 4), 4, (15, 15), 7),
    conv_case("a layer of SegNet", (1, 7, 9, 64), 128, (3, 3), 1),
]


class TensorCoreRow(Conv2dRow):
    """fprop, dgrad or wgrad in a tensor-core rung."""

    def cases(self) -> list[Case]:
        return CONVOLUTIONS + TENSOR_CORE_TILES

    def random_case(self, rng: np.random.Generator) -> Case:
        case = super().random_case(rng)
        if rng.integers(2):  # as many with whole pieces as without
            case = in_whole_pieces(Case(case.reason, {**case.sizes, "o": -(-case["o"] // 8) * 8}), 8)
        return case

    def reference_plan(self, case: Case) -> Op:
        return self.planned(case, np.float64, "direct")

    def as_seen(self, name: str, array: np.ndarray) -> np.ndarray:
        return round_to_tf32(array) if self.rung == "tf32" and name != "bias" else array


# Blocks of 16 x 16, 128 x 64 and 64 x 64 results, depths of 16 and 32.
EDGES = [
    *(conv_case(f"{p} pixels, {o} outputs", (1, 1, p, 16), o, (1, 1)) for p, o in ((15, 17), (16, 16), (17, 15))),
    *(conv_case(f"{p} pixels, {o} outputs", (1, 1, p, 16), o, (1, 1)) for p, o in ((63, 65), (64, 64), (65, 63))),
    *(conv_case(f"{c} channels: rounds of the depth", (1, 3, 5, c), 9, (1, 1)) for c in (8, 24, 32, 40, 72)),
]


class LessonRow(Conv2dRow):
    """fprop by the kernel of a lesson."""

    function = ""  # nobody calls it but this row

    def cases(self) -> list[Case]:
        return [in_whole_pieces(case, self.channels) for case in CONVOLUTIONS + TILES + EDGES]

    def random_case(self, rng: np.random.Generator) -> Case:
        return in_whole_pieces(super().random_case(rng), self.channels)

    def reference_plan(self, case: Case) -> Op:
        weight = spec((case["o"], *case["kernel"], case["x"][3]), np.float64)
        return Conv2dForward.plan(spec(case["x"], np.float64), weight, case["stride"], case["padding"], "direct")

    def refusals(self) -> list[Refusal]:
        def attempt(c: int, stride: int, dtype: DTypeLike) -> object:
            return Conv2dLesson(spec((1, 4, 5, c), dtype), spec((2, 3, 3, c), dtype), stride, 1, self.rung)

        taken = self.elements[0]
        refusals = [Refusal("stride 2", lambda: attempt(8, 2, taken), ShapeError, "use 'direct'")]
        if self.channels > 1:
            multiples = f"multiples of {self.channels}"
            refusals.append(Refusal("channels", lambda: attempt(9, 1, taken), ShapeError, multiples))
            refusals.append(Refusal("element type", lambda: attempt(8, 1, np.float64), DTypeError, "not float64"))
        return refusals


ROWS: tuple[Row, ...] = (
    *(Conv2dRow(op, "direct") for op in OPS),
    *(Conv2dRow(op, "tiled", elements=(*Row.elements, BFLOAT16)) for op in OPS),
    Conv2dBackwardBiasRow(Conv2dBackwardBias),
    *(
        LessonRow(
            Conv2dLesson, lesson, elements=tuple(spec((), kind).dtype for kind in of.elements), channels=of.channels
        )
        for lesson, of in LESSONS.items()
    ),
    *(TensorCoreRow(op, rung, elements=(element,)) for rung, element in ELEMENTS_OF_RUNG.items() for op in OPS),
)
