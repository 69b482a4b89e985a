"""Rows of the convolutions on tensor cores, and of the conversion to their element type.

The reference sees the factors as tensor cores do, rounded to tf32 or as bfloat16, multiplies and adds them in float64.
What remains is the float32 sum. In which order a tensor core adds is not documented, and it cuts bits off where others
round, so a term costs up to eps and not eps / 2: the bound is twice that of the other rungs, 4 eps sqrt(K) times the
sum of absolute products. It covers any order: nothing in the argument for sqrt(K) (rows/base.py) depends on one.
"""

import numpy as np

from segnet_scratch.ops.cases import Case, MapRow, Row, in_whole_pieces
from segnet_scratch.ops.convolution.conv2d_cases import CONVOLUTIONS, OPS, Conv2dRow, conv_case
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.op import Op
from segnet_scratch.runtime.precision import BFLOAT16, ELEMENTS_OF_RUNG, round_to_tf32

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


class CastRow(MapRow):
    """One rounding to bfloat16, which is exact for small integers; back it is exact for all numbers."""

    def reference_plan(self, case: Case) -> Op:
        return self.plan(case, np.float32)


ROWS: tuple[Row, ...] = (
    *(TensorCoreRow(op, rung, elements=(element,)) for rung, element in ELEMENTS_OF_RUNG.items() for op in OPS),
    CastRow(Cast, name="cast_to_bfloat16", elements=(np.dtype(np.float32),)),
    CastRow(Cast, name="cast_from_bfloat16", elements=(BFLOAT16,)),
)
