"""Rows of batch norm, ReLU and pool of the fused engine.

A pool decides by comparisons, which an error in the last bit would turn. There y and the numbers of the channels are
multiples of 1/4 or powers of 2, so that nothing is rounded and ties are frequent: every bit must be right.
"""

from math import sqrt

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import ShapeError
from segnet_scratch.ops.norm_relu import (
    NormMergeGradients,
    NormMergeStatistics,
    NormReluBackward,
    NormReluForward,
    NormReluPoolBackward,
    NormReluPoolForward,
)
from segnet_scratch.ops.op import Buffers, Op, spec
from segnet_scratch.ops.packed_codes import pack_codes, scatter_from
from segnet_scratch.ops.pieces import TILE_ROWS
from segnet_scratch.ops.windows import CODE, valid_codes
from segnet_scratch.precision import BFLOAT16
from segnet_scratch.proof.rows.base import Bounds, Case, Inputs, Refusal, Row, maps, random_map

# Maps whose channels are pieces: 4 float32 or 8 bfloat16. A block has 256 threads, each with one piece of a row.
PIECES: dict[str, tuple[int, ...]] = {
    "one pixel, one piece": (1, 1, 1, 8),
    "one row": (1, 1, 9, 8),
    "one column": (2, 7, 1, 16),
    "even": (2, 4, 6, 8),
    "odd height and width": (1, 5, 7, 24),
    "pieces that do not divide a block": (1, 3, 5, 40),
    "a row less than a block": (1, 1, 127, 16),
    "more rows than a block": (1, 3, 43, 16),
    "a map of SegNet": (2, 6, 8, 64),
    "as many pieces as threads": (1, 2, 3, 2048),
    "more pieces than threads": (1, 1, 3, 2056),
}


class MergeRow(Row):
    """Sums over tiles. `elements` are those of the partials; float64 is for the reference."""

    elements = (np.dtype(np.float32),)

    def cases(self) -> list[Case]:
        rows = {
            "two rows": 2,
            "a row less than a tile": TILE_ROWS - 1,
            "one tile": TILE_ROWS,
            "a second tile of one row": TILE_ROWS + 1,
            "as many tiles as lanes": 64 * TILE_ROWS,
            "more tiles than lanes": 65 * TILE_ROWS - 5,
        }
        channels = 8, 7, 9, 1, 16, 20
        return [Case(r, {"rows": n, "c": c}) for (r, n), c in zip(rows.items(), channels, strict=True)]

    def random_case(self, rng: np.random.Generator) -> Case:
        return Case("random", {"rows": int(rng.integers(2, 40 * TILE_ROWS)), "c": int(rng.integers(1, 40))})

    def partials(self, case: Case, dtype: DTypeLike) -> tuple[int, ...]:
        return -(-case["rows"] // TILE_ROWS), 2, case["c"]

    def refusals(self) -> list[Refusal]:
        flat = spec((2, 8), np.float32)
        rows = () if self.op is NormMergeGradients else (2,)
        return [Refusal("two dimensions", lambda: self.op.plan(flat, *rows), ShapeError, "expected (tiles, 2, c)")]


class MergeStatisticsRow(MergeRow):
    """Batch norm's statistics; all sums in double, so what remains is the rounding of the results."""

    name, op = "norm_merge_statistics", NormMergeStatistics

    def cases(self) -> list[Case]:
        far = Case("means 1000 times the deviation", {"rows": 1000, "c": 8, "offset": 1e3})
        return [*super().cases(), far]

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return NormMergeStatistics.plan(spec(self.partials(case, dtype), dtype), case["rows"])

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        partials, dtype = arrays["partials"], op.inputs["partials"].dtype
        assert partials is not None
        partials[:, 0] += dtype.type(case.sizes.get("offset", 1.0))
        partials[:, 1] = np.abs(partials[:, 1]) * TILE_ROWS
        arrays["running_var"] = rng.uniform(0.1, 4, case["c"]).astype(dtype)
        return arrays

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        batch_mean = np.abs(b.mean)
        variance = 1 / b.inv_std**2
        return {
            "mean": eps * batch_mean,
            "inv_std": 2 * eps * b.inv_std,
            "running_mean": 2 * eps * (np.abs(b.running_mean) + batch_mean),
            "running_var": 2 * eps * (b.running_var + 2 * variance),
        }

    def refusals(self) -> list[Refusal]:
        one = spec((1, 2, 8), np.float32)
        return [
            *super().refusals(),
            Refusal("one row", lambda: NormMergeStatistics.plan(one, 1), ShapeError, "n*h*w > 1"),
            Refusal("tiles", lambda: NormMergeStatistics.plan(one, 129), ShapeError, "129 rows are 2 tiles"),
        ]


class MergeGradientsRow(MergeRow):
    """dweight and dbias of batch norm."""

    name, op = "norm_merge_gradients", NormMergeGradients
    exact = True

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return NormMergeGradients.plan(spec(self.partials(case, dtype), dtype))

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # Sums in double: the rounding of the result, and what double loses in sums of floats that cancel.
        terms = np.abs(b.partials).sum(0)
        lost = 2.0**-52 * sqrt(len(b.partials))
        return {"dbias": eps * np.abs(b.dbias) + lost * terms[0], "dweight": eps * np.abs(b.dweight) + lost * terms[1]}


class NormRow(Row):
    """Passes over maps."""

    elements = (np.dtype(np.float32), BFLOAT16)

    def __init__(self, op: type[Op], *options: bool) -> None:
        self.op, self.options = op, options
        self.name = op.name + ("" if all(options) else "_linear")

    def cases(self) -> list[Case]:
        return maps(PIECES)

    def random_case(self, rng: np.random.Generator) -> Case:
        n, h, w, c = random_map(rng)
        return Case("random", {"x": (n, h, w, 8 * c)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec(case["x"], dtype), *self.options)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        arrays["inv_std"] = rng.uniform(0.1, 4, op.inputs["inv_std"].shape).astype(op.inputs["inv_std"].dtype)
        if "codes" in arrays:
            windows = op.inputs["dr"].shape
            arrays["codes"] = pack_codes(valid_codes(rng.integers(0, 4, windows).astype(CODE), case["x"][1:3]))
        return arrays

    def refusals(self) -> list[Refusal]:
        def refusal(reason: str, message: str, shape: tuple[int, ...]) -> Refusal:
            return Refusal(reason, lambda: self.op.plan(spec(shape, np.float32), *self.options), ShapeError, message)

        return [
            refusal("half a piece", "use a width", (1, 4, 5, 6)),
            refusal("three dimensions", "channels last", (4, 5, 8)),
            refusal("empty", "empty", (0, 4, 5, 8)),
        ]


class NormForwardRow(NormRow):
    """z: a difference, two products, a sum."""

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"z": 4 * eps * (np.abs(b.y - b.mean) * b.inv_std * np.abs(b.weight) + np.abs(b.bias))}


class NormPoolRow(NormRow):
    """Pooled values and codes, to the last bit."""

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        def drawn(name: str, numbers: np.ndarray) -> np.ndarray:
            s = op.inputs[name]
            return rng.choice(numbers, s.shape).astype(s.dtype)

        quarters, powers = np.arange(-8, 9) / 4, np.array([0.5, 1, 2])
        return {
            "y": drawn("y", quarters),
            "mean": drawn("mean", quarters),
            "inv_std": drawn("inv_std", powers),
            "weight": drawn("weight", np.concatenate([powers, -powers, [0]])),
            "bias": drawn("bias", quarters),
        }


class NormBackwardRow(NormRow):
    """dy: the two means, a product and two differences."""

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        xhat, rows = np.abs(b.y - b.mean) * b.inv_std, op.rows  # type: ignore[attr-defined]
        dr = scatter_from(b.dr, b.codes, b.y.shape[1:3]) if "codes" in op.inputs else b.dr
        terms = np.abs(dr) + np.abs(b.dbias) / rows + xhat * np.abs(b.dweight) / rows
        error = 6 * eps * np.abs(b.weight) * b.inv_std * terms
        return {"dy" if op.outputs else "dr": error}


def norm_rows() -> list[Row]:
    """Every op of norm_relu.cu."""
    return [
        MergeStatisticsRow(),
        MergeGradientsRow(),
        NormForwardRow(NormReluForward, True),
        NormForwardRow(NormReluForward, False),
        NormPoolRow(NormReluPoolForward, True),
        NormPoolRow(NormReluPoolForward, False),
        NormBackwardRow(NormReluBackward),
        NormBackwardRow(NormReluPoolBackward),
    ]
