"""Rows of the convolutions on Hopper's tensor cores: those of the fused engine and of wgrad, with shapes of their own.

Blocks of 8x8 pixels, four of them (or two, or pixels in a row) to a tile, 64 channels to a chunk of the depth, 64 or
128 columns: the smallest cases that reach each edge, since each is a block of 384 or 640 threads with its products.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.cases import Bounds, Case, Hostile, Inputs, MapRow, Refusal, Row, in_whole_pieces, of_magnitudes
from segnet_scratch.ops.convolution.conv2d_fused_cases import (
    FusedBackwardDataRow,
    FusedForwardRow,
    FusedInferenceRow,
    FusedRow,
    fused_case,
)
from segnet_scratch.ops.convolution.conv2d_hopper import (
    CHANNELS,
    NAMED,
    TILES,
    HopperBackwardData,
    HopperBackwardWeight,
    HopperForward,
)
from segnet_scratch.ops.convolution.split_planes import PLANES, SplitPlanes, as_planes, joined
from segnet_scratch.ops.op import Buffers, Op, Spec, spec, spec_of
from segnet_scratch.runtime.precision import BFLOAT16, ELEMENTS_OF_RUNG


def _case(
    reason: str, size: tuple[int, int, int], tile: str, c: int = CHANNELS, o: int | None = None, **options: Any
) -> Case:
    """A convolution from c channels to o, or as many columns as the tile has."""
    return fused_case(f"{reason}, {tile}", size, c, o or NAMED[tile].columns, tile=tile, **options)


SHAPES = [
    _case("one pixel", (1, 1, 1), "halo_256x64"),
    _case("a block", (1, 8, 8), "halo_256x64"),
    _case("a pixel less than blocks", (1, 7, 15), "halo_256x64"),
    _case("a pixel more than blocks", (1, 9, 17), "halo_256x64"),
    _case("five tiles of the columns of two", (5, 9, 11), "halo_256x64", o=128),
    _case("two chunks of depth, of which a block has two tiles", (3, 9, 11), "halo_256x64", 128),
    _case("two tiles, the second one not full; odd sizes", (2, 9, 11), "halo_256x64"),
    _case("one row", (1, 1, 19), "halo_128x128"),
    _case("two chunks of depth", (1, 8, 8), "halo_128x128", 128),
    _case("one column of blocks, many images", (5, 5, 3), "halo_256x128"),
    _case("a pixel more than a tile", (1, 3, 43), "columns_128x128"),
    _case("images that do not end with a tile", (3, 7, 7), "columns_128x128"),
    _case("images that do not end with a tile", (3, 9, 10), "columns_256x128"),
    _case("three tiles: a block goes on to a second one", (3, 9, 10), "columns_128x128"),
]
# Fewer outputs than a tile has: the rest of it is zeros.
CLASSIFIERS = [
    fused_case("21 classes in whole pieces", (1, 9, 11), CHANNELS, 24, tile="halo_256x32"),
    fused_case("a piece less than a chunk", (1, 5, 9), CHANNELS, 56, tile="halo_256x64"),
]


class HopperRow(FusedRow):
    """What the rows share."""

    channels = CHANNELS
    fewest_columns = 0
    windows = ""  # the option that asks for 2x2 windows, which only halo tiles have

    def given(self, case: Case) -> dict[str, Any]:
        return {"tile": replace(NAMED[case["tile"]], blocks=2)}  # few, so that each has several tiles

    def growth(self, terms: int, eps: float) -> float:
        # Of two planes the product of the second ones, each at most 2^-8 of its factor, is left out.
        return super().growth(terms, eps) + (2.0**-16 if self.rung == "tf32" else 0)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        whole = super().inputs(self.reference_plan(case), case, rng, integers)
        return {name: as_planes(a, op.inputs[name]) for name, a in whole.items() if a is not None}

    def as_seen(self, name: str, array: np.ndarray) -> np.ndarray:
        return joined(array, PLANES[self.rung]) if name in ("x", "dy", "weight") else array

    def cases(self) -> list[Case]:
        found = []
        # With planes the way into and out of each kind of tile, no more: each is three or six times the work.
        for i, case in enumerate(SHAPES if self.rung == "bf16" else {case["tile"]: case for case in SHAPES}.values()):
            halo = NAMED[case["tile"]].halo
            fitting = [options for options in self.options if halo or not options.get(self.windows)]
            found.append(Case(case.reason, {**case.sizes, **fitting[i % len(fitting)]}))
        return [*found, *self.classifiers()] + [
            _case(f"odd edges {number}", (1, 9, 11), "halo_256x64", **options)
            for number, options in enumerate(self.options)
        ]

    def classifiers(self) -> list[Case]:
        """Cases of few outputs."""
        return [Case(case.reason, {**case.sizes, **self.options[0]}) for case in CLASSIFIERS]

    def random_case(self, rng: np.random.Generator) -> Case:
        options = self.options[rng.integers(len(self.options))]
        anywhere = not options.get(self.windows)
        fitting = [t.name for t in TILES if (t.halo or anywhere) and t.columns >= self.fewest_columns]
        size = int(rng.integers(1, 3)), int(rng.integers(1, 12)), int(rng.integers(1, 12))
        return _case("random", size, fitting[rng.integers(len(fitting))], **options)

    def refusals(self) -> list[Refusal]:
        def case(*sizes: Any, tile: str = "halo_256x64") -> Case:
            return fused_case("", *sizes, tile=tile, **self.options[-1])

        return self.refused_cases(
            {
                "7x7": ("takes 3x3", case((1, 8, 8), 64, 64, 7)),
                "channels": ("multiples of 64", case((1, 8, 8), 72, 64)),
                "columns": ("expected one of", case((1, 8, 8), 64, 64, tile="halo_128x128")),
                "empty": ("empty", case((0, 4, 5), 64, 64)),
            }
        )


class HopperForwardRow(HopperRow, FusedForwardRow):
    """fprop of training: y, the statistics of its groups of pixels and how many pixels they have."""

    op = HopperForward


class HopperInferenceRow(HopperRow, FusedInferenceRow):
    """fprop of inference: bias, ReLU and pool."""

    op, windows = HopperForward, "pool"


class HopperBackwardDataRow(HopperRow, FusedBackwardDataRow):
    """dgrad: gathered at an unpool or not."""

    op, windows = HopperBackwardData, "unpool"
    fewest_columns = CHANNELS  # they are channels of x

    def classifiers(self) -> list[Case]:
        # What a case calls channels and outputs are those of dgrad's product: dy has few.
        few = [fused_case(case.reason, case["x"][:3], case["o"], CHANNELS, tile="halo_256x64") for case in CLASSIFIERS]
        return [Case(case.reason, {**case.sizes, **self.options[0]}) for case in few]

    def specs(self, case: Case, dtype: DTypeLike) -> tuple[Spec, Spec]:
        *size, o = case["x"]
        return spec((*size, case["o"]), dtype), spec((o, *case["kernel"], case["o"]), dtype)


class HopperBackwardWeightRow(HopperRow):
    """wgrad."""

    op = HopperBackwardWeight

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(*self.specs(case, dtype), self.rung)

    def refusals(self) -> list[Refusal]:
        return [refusal for refusal in super().refusals() if refusal.reason != "columns"]

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        g = op.geometry  # type: ignore[attr-defined]
        return {"dweight": self.growth(g.pixels, eps) * of_magnitudes(op, b).dweight}


class SplitPlanesRow(MapRow):
    """Roundings and exact differences: every bit is the reference's."""

    elements, channels = (np.dtype(np.float32),), 4

    def cases(self) -> list[Case]:
        return [in_whole_pieces(case, self.channels) for case in super().cases()]

    def random_case(self, rng: np.random.Generator) -> Case:
        return in_whole_pieces(super().random_case(rng), self.channels)

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return SplitPlanes.plan(spec(case["x"], dtype), 2 + case["x"][1] % 2)

    def reference_plan(self, case: Case) -> Op:
        return self.plan(case, np.float32)

    def refusals(self) -> list[Refusal]:
        plain = {"x": spec((2, 8)), "planes": 3}
        wrong: dict[str, tuple[Any, ...]] = {
            "empty": ("empty", {"x": spec((0, 8))}),
            "channels": ("a multiple of 4", {"x": spec((2, 6))}),
            "planes": ("expected 2 or 3", {"planes": 4}),
            "bfloat16": ("expected float32", {"x": spec((2, 8), BFLOAT16)}, DTypeError),
        }
        return self.refused(plain, wrong)

    def hostile(self, rng: np.random.Generator) -> Hostile:
        x = np.array([np.inf, -np.inf, np.nan, 3.4e38, -0.0, 0, 1 + 2**-9, 1 + 2**-17], np.float32)
        first = [np.inf, -np.inf, np.nan, np.inf, -0.0, 0, 1, 1]
        planes = [*first, *(0, 0, 0, 0, 0, 0, 2**-9, 2**-17), *(0,) * 8]
        return Hostile(SplitPlanes.plan(spec_of(x), 3), {"x": x}, {"y": np.array(planes).astype(BFLOAT16)})


_ROWS = {
    "forward": HopperForwardRow,
    "inference": HopperInferenceRow,
    "backward_data": HopperBackwardDataRow,
    "backward_weight": HopperBackwardWeightRow,
}
ROWS: tuple[Row, ...] = (
    *(
        row(rung=rung, name=f"conv2d_hopper_{what}_{rung}", elements=(ELEMENTS_OF_RUNG[rung],))
        for rung in PLANES
        for what, row in _ROWS.items()
    ),
    SplitPlanesRow(SplitPlanes),
)
