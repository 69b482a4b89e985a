"""Rows of the convolutions: fprop, dgrad and wgrad of each rung, and the gradient of the bias."""

from math import sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.cases import (
    COLUMN_MAPS,
    Bounds,
    Case,
    Inputs,
    MapRow,
    Refusal,
    Row,
    Shape,
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
from segnet_scratch.ops.op import Buffers, Op, Spec, spec
from segnet_scratch.runtime.precision import BFLOAT16


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
    # Tensor cores: twice that (conv2d_mma_cases.py), which the kernels of lessons keep with room to spare. In tf32x3 a
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
ROWS: tuple[Row, ...] = (
    *(Conv2dRow(op, "direct") for op in OPS),
    *(Conv2dRow(op, "tiled", elements=(*Row.elements, BFLOAT16)) for op in OPS),
    Conv2dBackwardBiasRow(Conv2dBackwardBias),
)
