"""Rows of the fused convolutions.

Their bounds are those of the tensor-core rungs (TensorCoreRow), carried through what follows the convolution.
Two things decide by a comparison, which an error in the last bit would turn: a max-pool, and the ReLU that stops a
gradient. There the inputs make the compared numbers exact: small integers before a pool, so that nothing is rounded and
ties are frequent; multiples of 1/4 in the batch norm of the block below.
"""

from collections.abc import Mapping
from functools import partial
from math import sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.cases import Bounds, Case, Inputs, Refusal, Row, of_magnitudes
from segnet_scratch.ops.convolution.conv2d_cases import growth_of
from segnet_scratch.ops.convolution.conv2d_fused import Below, FusedBackwardData, FusedForward, plain_forward
from segnet_scratch.ops.normalisation.norm_relu_cases import packed
from segnet_scratch.ops.op import Buffers, Op, Spec, spec
from segnet_scratch.ops.pieces import TILE_ROWS
from segnet_scratch.ops.pooling.packed_codes import gather_at
from segnet_scratch.ops.pooling.windows import windows_of
from segnet_scratch.runtime.precision import BFLOAT16_ROUNDING, ELEMENTS_OF_RUNG, round_to_tf32


def fused_case(reason: str, size: tuple[int, int, int], c: int, o: int, kernel: int = 3, **options: Any) -> Case:
    """A convolution of `size` (n, h, w) from c to o channels."""
    return Case(reason, {"x": (*size, c), "o": o, "kernel": (kernel, kernel), **options})


# Blocks compute 128 rows x 32, 64 or 128 columns; a stage is 32 float32 or 64 bfloat16 of depth.
SHAPES = [
    fused_case("one pixel", (1, 1, 1), 8, 8),
    fused_case("one row", (1, 1, 9), 8, 16),
    fused_case("one column", (2, 7, 1), 16, 8),
    fused_case("odd sizes", (1, 5, 7), 16, 24),
    fused_case("even sizes", (2, 6, 4), 8, 40),
    *(fused_case(f"{p} pixels of a tile's 128", (1, 1, p), 8, 8, 1) for p in (127, 128, 129)),
    *(fused_case(f"{o} outputs: columns of the tiles", (1, 3, 5), 16, o, 1) for o in (32, 64, 72, 128, 136)),
    *(fused_case(f"{c} channels: stages and columns", (1, 3, 5), c, 16, 1) for c in (32, 64, 72, 136)),
    fused_case("stages that cut through taps", (2, 5, 6), 40, 48),
    fused_case("windows of many images in a tile", (30, 2, 3), 8, 16),
    fused_case("kernel larger than the image", (2, 3, 3), 8, 8, 5),
    fused_case("SegNet-Basic", (1, 9, 10), 8, 8, 7),
    fused_case("a layer of SegNet", (1, 7, 9), 64, 128),
]


class FusedRow(Row):
    """What the rows share. `exact` is not asked for: bfloat16 rounds integers beyond 256 before they are summed."""

    channels = 8
    options: tuple[dict[str, Any], ...] = ({},)  # each goes with every shape, in turn

    asked: ClassVar[dict[str, bool]] = {}  # in every plan

    def cases(self) -> list[Case]:
        chosen = [(case, self.options[i % len(self.options)]) for i, case in enumerate(SHAPES)]
        found = [Case(case.reason, {**case.sizes, **options}) for case, options in chosen]
        return found + self.with_every_option("odd edges", (1, 5, 7), 16, 24)

    def with_every_option(self, reason: str, size: tuple[int, int, int], c: int, o: int) -> list[Case]:
        """One shape with each of the options."""
        named = [(", ".join(key for key, value in options.items() if value), options) for options in self.options]
        return [fused_case(f"{reason}; {names or 'plain'}", size, c, o, **options) for names, options in named]

    def random_case(self, rng: np.random.Generator) -> Case:
        n, h, w, c, o = (int(k) for k in rng.integers(1, (4, 16, 16, 12, 18)))
        piece = 16 // self.elements[0].itemsize
        kernel, options = int(rng.choice([1, 3, 3, 3, 5])), self.options[rng.integers(len(self.options))]
        return fused_case("random", (n, h, w), piece * c, piece * o, kernel, **options)

    def specs(self, case: Case, dtype: DTypeLike) -> tuple[Spec, Spec]:
        """x, of full size, and weight."""
        x, o = case["x"], case["o"]
        return spec(x, dtype), spec((o, *case["kernel"], x[3]), dtype)

    def given(self, case: Case) -> dict[str, Any]:
        """What plans are given beside the options."""
        return {}

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        options = {name: case[name] for name in self.options[0]}
        rung = case.sizes.get("rung", self.rung)
        return self.op.plan(*self.specs(case, dtype), rung, **self.asked, **self.given(case), **options)

    def as_seen(self, name: str, array: np.ndarray) -> np.ndarray:
        rounded = self.rung == "tf32" and name in ("x", "dy", "weight", "flipped")
        return round_to_tf32(array) if rounded else array

    def growth(self, terms: int, eps: float) -> float:
        """The error of a sum of so many terms, relative to the sum of their absolute values."""
        return growth_of(self.rung, terms) * eps

    def stored(self, y: np.ndarray) -> np.ndarray | float:
        """The rounding to what is stored, where that is summed up."""
        return BFLOAT16_ROUNDING * np.abs(y) if self.rung == "bf16" else 0.0

    def refused_cases(self, wrong: Mapping[str, tuple[Any, ...]]) -> list[Refusal]:
        """Plans of cases: by reason the words of the message, the case, and the error, unless it is a ShapeError."""
        return [
            Refusal(reason, partial(self.plan, case, self.elements[0]), (*error, ShapeError)[0], message)
            for reason, (message, case, *error) in wrong.items()
        ]

    def refusals(self) -> list[Refusal]:
        options = self.options[-1]
        return self.refused_cases(
            {
                "even kernel": ("odd kh and kw", fused_case("", (1, 4, 5), 8, 8, 2, **options)),
                "half a piece of outputs": ("use a width", fused_case("", (1, 4, 5), 8, 6, **options)),
                "empty": ("empty", fused_case("", (0, 4, 5), 8, 8, **options)),
                "unknown rung": (
                    "no rung 'tiled'",
                    fused_case("", (1, 5, 7), 16, 24, rung="tiled", **options),
                    DTypeError,
                ),
            }
        )


class FusedForwardRow(FusedRow):
    """fprop of training: y and the statistics of its tiles."""

    op: type[Op] = FusedForward
    asked: ClassVar = {"statistics": True}

    def cases(self) -> list[Case]:
        first = fused_case("first layer of SegNet: three channels, tiles across images", (3, 10, 15), 3, 64)
        basic = fused_case("first layer of SegNet-Basic: stages of weights", (1, 13, 30), 3, 8, 7)
        return [*super().cases(), first, basic]

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        g = op.geometry  # type: ignore[attr-defined]
        y = self.growth(g.depth, eps) * of_magnitudes(op, b).y
        partials = np.empty_like(b.partials)
        tiles = op.summed_together  # type: ignore[attr-defined]
        for tile, (errors, rows) in enumerate(zip(tiles(y + self.stored(b.y)), tiles(b.y), strict=True)):
            if not len(rows):
                partials[tile] = 0
                continue
            # Each element errs by its bound; then the mean is summed up, and from it the distances.
            off = np.abs(rows - b.partials[tile, 0])
            d_mean = errors.mean(0) + 2 * eps * sqrt(len(rows)) * np.abs(rows).mean(0)
            d_distance = errors + d_mean + eps * np.abs(rows)
            partials[tile, 0] = d_mean
            partials[tile, 1] = (2 * off * d_distance + d_distance**2).sum(0) + 4 * eps * sqrt(len(rows)) * (
                off**2
            ).sum(0)
        return {"y": y, "partials": partials}


class FusedInferenceRow(FusedRow):
    """fprop of inference: bias, ReLU and pool."""

    op: type[Op] = FusedForward
    options = tuple({"relu": relu, "pool": pool} for pool in (False, True) for relu in (False, True))
    asked: ClassVar = {"bias": True}

    def cases(self) -> list[Case]:
        deep = self.with_every_option("deep and small, the depth is split", (1, 3, 5), 136, 72)
        uneven = fused_case("chunks of unequal depth", (2, 3, 2), 248, 8, **self.options[-1])
        first = fused_case("three channels, windows across images", (3, 9, 15), 3, 8, relu=True, pool=True)
        return [*super().cases(), *deep, uneven, first]

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        if op.pool:  # type: ignore[attr-defined]
            # Of factors -1, 0, 1 no sum here comes near 256, up to which bfloat16 is exact.
            arrays |= {name: rng.integers(-1, 2, s.shape).astype(s.dtype) for name, s in op.inputs.items()}
        return arrays

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        g = op.geometry  # type: ignore[attr-defined]
        if op.pool:  # type: ignore[attr-defined]
            return {}
        return {"y": self.growth(g.depth + 1, eps) * of_magnitudes(op, b).y}


class FusedBackwardDataRow(FusedRow):
    """dgrad: gathered at an unpool or not, from a block with a ReLU or without."""

    op: type[Op] = FusedBackwardData
    options = tuple({"unpool": unpool, "relu": relu} for unpool in (False, True) for relu in (True, False))

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        x, weight = self.specs(case, dtype)
        unpool = case["unpool"]
        dy = x.with_shape(*x.shape[:3], weight.shape[0])
        below = Below(x.with_shape(*(windows_of(*x.shape) if unpool else x.shape)), case["relu"])
        rung, size = case.sizes.get("rung", self.rung), x.shape[1:3] if unpool else None
        return self.op.plan(dy, weight, below, rung, size, **self.given(case))

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        shapes = {name: s.shape for name, s in op.inputs.items()}

        def quarters(name: str) -> np.ndarray:
            return (rng.integers(-8, 9, shapes[name]) / 4).astype(op.inputs[name].dtype)

        arrays |= {name: quarters(name) for name in ("below_y", "mean", "bn_weight", "bn_bias")}
        arrays["inv_std"] = rng.choice([0.25, 0.5, 1, 2], shapes["inv_std"]).astype(op.inputs["inv_std"].dtype)
        if "unpool_codes" in arrays:
            arrays["unpool_codes"] = packed(rng, op.outputs["dr"].shape, case["x"][1:3])
        return arrays

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        g = op.geometry  # type: ignore[attr-defined]
        magnitudes = plain_forward(np.abs(b.dy), np.abs(op.flipped(b)))  # type: ignore[attr-defined]
        error, y = self.growth(g.kh * g.kw * g.o, eps) * magnitudes, b.below_y
        if "unpool_codes" in op.inputs:
            error = gather_at(error, b.unpool_codes)
        xhat = np.abs(y - b.mean) * b.inv_std
        if op.below.relu:  # type: ignore[attr-defined]
            error = np.where((y - b.mean) * (b.inv_std * b.bn_weight) + b.bn_bias > 0, error, 0)
        partials = np.empty_like(b.partials)
        summed = error + self.stored(b.dr) + 4 * eps * sqrt(TILE_ROWS) * np.abs(b.dr)
        for number, term in enumerate((summed, summed * xhat)):
            for tile, part in enumerate(op.summed_together(term)):  # type: ignore[attr-defined]
                partials[tile, number] = part.sum(0)
        return {"dr": error, "partials": partials}


_ROWS = {"forward": FusedForwardRow, "inference": FusedInferenceRow, "backward_data": FusedBackwardDataRow}
ROWS = tuple(
    row(rung=rung, name=f"conv2d_fused_{what}_{rung}", elements=(element,))
    for rung, element in ELEMENTS_OF_RUNG.items()
    for what, row in _ROWS.items()
)
