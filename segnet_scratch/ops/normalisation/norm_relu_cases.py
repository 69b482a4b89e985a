"""Rows of batch norm, ReLU and pool of the fused engine.

A pool decides by comparisons, which an error in the last bit would turn. There y and the numbers of the channels are
multiples of 1/4 or powers of 2, so that nothing is rounded, not even to bfloat16, and ties are frequent: every bit must
be right. With other numbers the kernels are compared, bit by bit, with those of the layers in tests/test_norm_relu.py.
"""

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops import by_hand
from segnet_scratch.ops.cases import Bounds, Case, Hostile, Inputs, MapRow, Refusal, Row, random_map, values
from segnet_scratch.ops.convolution.split_planes import as_planes
from segnet_scratch.ops.normalisation.norm_relu import (
    NormMergeGradients,
    NormMergeStatistics,
    NormReluBackward,
    NormReluForward,
    NormReluPoolBackward,
    NormReluPoolForward,
    NormReluUnpoolForward,
)
from segnet_scratch.ops.op import Buffers, Op, Spec, spec
from segnet_scratch.ops.pieces import TILE_ROWS
from segnet_scratch.ops.pooling.packed_codes import pack_codes, scatter_from
from segnet_scratch.ops.pooling.windows import CODE, valid_codes, windows_of
from segnet_scratch.runtime.precision import BFLOAT16

# Maps whose channels are pieces: 4 float32 or 8 bfloat16. A block has 256 threads, each with one piece of some rows.
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
        cases = {
            "two rows": (2, 8),
            "a row less than a tile": (TILE_ROWS - 1, 7),
            "one tile": (TILE_ROWS, 9),
            "a second tile of one row": (TILE_ROWS + 1, 1),
            "as many tiles as lanes": (64 * TILE_ROWS, 16),
            "more tiles than lanes": (65 * TILE_ROWS - 5, 20),
            "a batch of SegNet's largest maps": (16 * 224 * 224, 2),
        }
        return [Case(reason, {"rows": rows, "c": c}) for reason, (rows, c) in cases.items()]

    def random_case(self, rng: np.random.Generator) -> Case:
        return Case("random", {"rows": int(rng.integers(2, 40 * TILE_ROWS)), "c": int(rng.integers(1, 40))})

    def partials(self, case: Case, dtype: DTypeLike) -> tuple[int, ...]:
        return -(-case["rows"] // TILE_ROWS), 2, case["c"]

    def refusals(self) -> list[Refusal]:
        plain = {"rows": 2} if self.op is NormMergeStatistics else {}
        return self.refused(plain, {"two dimensions": ("expected (tiles, 2, c)", {"partials": spec((2, 8))})})


class MergeStatisticsRow(MergeRow):
    """Batch norm's statistics; all sums in double, so what remains is the rounding of the results."""

    op = NormMergeStatistics

    def cases(self) -> list[Case]:
        far = Case("means 1000 times the deviation", {"rows": 1000, "c": 8, "offset": 1e3})
        counted = Case("tiles of unlike sizes, some empty", {"rows": 1000, "c": 9, "counted": True})
        return [*super().cases(), far, counted]

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        partials, counted = spec(self.partials(case, dtype), dtype), case.sizes.get("counted", False)
        return NormMergeStatistics.plan(partials, case["rows"], counted=counted)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        partials, dtype = arrays["partials"], op.inputs["partials"].dtype
        assert partials is not None
        partials[:, 0] += dtype.type(case.sizes.get("offset", 1.0))
        partials[:, 1] = np.abs(partials[:, 1]) * TILE_ROWS
        arrays["running_var"] = rng.uniform(0.1, 4, case["c"]).astype(dtype)
        if "counts" in arrays:
            # One row is the first tile's; the others fall where they may, none into the last tile.
            falls = rng.integers(0, len(partials) - 1, case["rows"] - 1)
            arrays["counts"] = np.bincount([0, *falls], minlength=len(partials)).astype(np.int32)
        return arrays

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        batch_mean = np.abs(b.mean)
        variance = 1 / b.inv_std**2
        # No tile's mean is further from the pivot than sqrt(2 M2 / 128): of M2, double loses 2^-52 tiles at most.
        lost = 2.0**-52 * sqrt(len(b.partials)) * np.abs(b.partials[:, 0]).max(0)
        return {
            "mean": eps * batch_mean + lost,
            "inv_std": 2 * eps * b.inv_std,
            "running_mean": 2 * eps * (np.abs(b.running_mean) + batch_mean),
            "running_var": 2 * eps * (b.running_var + 2 * variance),
        }

    def refusals(self) -> list[Refusal]:
        wrong = {"one row": ("n*h*w > 1", {"rows": 1}), "tiles": ("129 rows are 2 tiles", {"rows": 129})}
        return [*super().refusals(), *self.refused({"partials": spec((1, 2, 8))}, wrong)]


class MergeGradientsRow(MergeRow):
    """dweight and dbias of batch norm."""

    op, exact = NormMergeGradients, True

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return NormMergeGradients.plan(spec(self.partials(case, dtype), dtype))

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # Sums in double: the rounding of the result, and what double loses in sums of floats that cancel.
        terms = np.abs(b.partials).sum(0)
        lost = 2.0**-52 * sqrt(len(b.partials))
        return {"dbias": eps * np.abs(b.dbias) + lost * terms[0], "dweight": eps * np.abs(b.dweight) + lost * terms[1]}


class NormRow(MapRow):
    """Passes over maps of one element type: for each there are kernels of their own to be proven."""

    exact, channels, shapes = False, 8, PIECES
    in_planes = False  # the output, of float32, as Hopper's convolutions read it

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        planes = {"planes": 2 + case["x"][2] % 2} if self.in_planes else {}
        return self.op.plan(*self.specs(case, dtype), *self.options, **planes)

    def specs(self, case: Case, dtype: DTypeLike) -> tuple[Any, ...]:
        """What the plan takes beside the options."""
        return (spec(case["x"], dtype),)

    def planes(self, op: Op, output: str) -> int:
        return op.planes if self.in_planes else 1  # type: ignore[attr-defined]

    def made(self, op: Op, inputs: Inputs, output: np.ndarray, **others: np.ndarray) -> Hostile:
        """Hostile inputs that must give this output, and these others."""
        (name,) = {*op.outputs, *op.updates} - others.keys()
        return Hostile(op, inputs, {name: as_planes(output, (op.inputs | op.outputs)[name]), **others})

    def random_case(self, rng: np.random.Generator) -> Case:
        n, h, w, c = random_map(rng)
        return Case("random", {"x": (n, h, w, 8 * c)})

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        if "inv_std" in arrays:
            arrays["inv_std"] = rng.uniform(0.1, 4, op.inputs["inv_std"].shape).astype(op.inputs["inv_std"].dtype)
        if "codes" in arrays:
            arrays["codes"] = packed(rng, windows_of(*case["x"]), case["x"][1:3])
        return arrays

    def hostile_plan(self, rng: np.random.Generator) -> tuple[Op, Inputs]:
        """For a small map, with numbers of channels that change nothing: mean 0, gain 1, bias 0, no sums."""
        n, h, w = (int(k) for k in rng.integers(1, (3, 6, 6)))
        op = self.plan(Case("hostile", {"x": (n, h, w, 8 * int(rng.integers(1, 4)))}), self.elements[0])
        return op, neutral(op)

    def rectified(self, y: np.ndarray) -> np.ndarray:
        """Its ReLU, where there is one; a NaN stays one."""
        return np.where(y < 0, 0, y).astype(y.dtype) if all(self.options) else y

    def refusals(self) -> list[Refusal]:
        element = self.elements[0]
        wrong: dict[str, tuple[Any, ...]] = {
            "half a piece": ("use a width", {"y": spec((1, 4, 5, 6), element)}),
            "three dimensions": ("channels last", {"y": spec((4, 5, 8), element)}),
            "empty": ("empty", {"y": spec((0, 4, 5, 8), element)}),
        }
        if self.in_planes:
            y = spec((1, 4, 5, 8), BFLOAT16)
            wrong["bfloat16"] = ("planes are those of float32", {"y": y, "planes": 2}, DTypeError)
        return self.refused({}, wrong)


class NormForwardRow(NormRow):
    """z: a difference, two products, a sum."""

    def hostile(self, rng: np.random.Generator) -> Hostile:
        op, inputs = self.hostile_plan(rng)
        inputs["y"] = y = special(rng, op.inputs["y"])
        return self.made(op, inputs, self.rectified(y))

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"z": z_error(b, eps)}


class NormPoolRow(NormRow):
    """Pooled values, codes and the y that they came from, to the last bit."""

    exact = True

    def hostile(self, rng: np.random.Generator) -> Hostile:
        op, inputs = self.hostile_plan(rng)
        inputs["y"] = y = special(rng, op.inputs["y"])
        pooled, codes = by_hand.pool(self.rectified(y))
        beside = {"codes": by_hand.packed(codes), "chosen": by_hand.gather(y, codes)}
        return self.made(op, inputs, pooled, **beside)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        quarters, powers = np.arange(-8, 9) / 4, np.array([0.5, 1, 2])
        gains = np.concatenate([powers, -powers, [0]])
        fine = [0, 2**-9 + 2**-18] if self.in_planes else [0]  # three planes, and still nothing is rounded
        y = np.add.outer(quarters, fine).ravel()
        of = {"y": y, "mean": quarters, "inv_std": powers, "weight": gains, "bias": quarters}
        return {name: rng.choice(of[name], s.shape).astype(s.dtype) for name, s in op.inputs.items()}


class UnpoolRow(NormRow):
    """Values, or their z, at the coded positions. The map of a case is the unpooled one."""

    op = NormReluUnpoolForward

    def cases(self) -> list[Case]:
        return [*super().cases(), Case("batch norm is folded", {"x": (2, 5, 4, 24), "folded": True})]

    def random_case(self, rng: np.random.Generator) -> Case:
        case = super().random_case(rng)
        return Case(case.reason, {**case.sizes, "folded": bool(rng.integers(2))})

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        absent = op.optional if case.sizes.get("folded") else ()
        return super().inputs(op, case, rng, integers) | dict.fromkeys(absent)

    def specs(self, case: Case, dtype: DTypeLike) -> tuple[Any, ...]:
        return spec(windows_of(*case["x"]), dtype), case["x"][1:3]

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        error = np.zeros_like(b.y) if b.mean is None else z_error(b, eps)
        return {"unpooled": scatter_from(error, b.codes, op.size)}  # type: ignore[attr-defined]

    def hostile(self, rng: np.random.Generator) -> Hostile:
        """NaN and infinite values stay where they belong; what a code puts outside the map is lost."""
        size = int(rng.integers(1, 6)), int(rng.integers(1, 6))
        op = self.plan(Case("hostile", {"x": (1, *size, 8)}), self.elements[0])
        inputs = neutral(op)
        inputs["y"] = x = special(rng, op.inputs["y"])
        codes = rng.integers(0, 4, x.shape).astype(CODE)
        inputs["codes"] = by_hand.packed(codes)
        x = self.rectified(x).copy()
        x[valid_codes(codes, size) != codes] = 0
        return self.made(op, inputs, by_hand.scatter(x, codes, size))

    def refusals(self) -> list[Refusal]:
        plain = {"y": spec((1, 2, 3, 8), self.elements[0])}
        return self.refused(plain, {"another size": ("a pool of a map of size (5, 6)", {"size": (5, 6)})})


class NormBackwardRow(NormRow):
    """dy: the two means, a product and two differences."""

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # The term with the longest way, xhat dweight / rows, has 7 roundings of eps / 2.
        xhat, rows = np.abs(b.y - b.mean) * b.inv_std, op.rows  # type: ignore[attr-defined]
        dr = scatter_from(b.dr, b.codes, b.y.shape[1:3]) if "codes" in op.inputs else b.dr
        terms = np.abs(dr) + np.abs(b.dbias) / rows + xhat * np.abs(b.dweight) / rows
        error = 4 * eps * np.abs(b.weight) * b.inv_std * terms
        return {"dy" if op.outputs else "dr": error}

    def hostile(self, rng: np.random.Generator) -> Hostile:
        """NaN and infinite gradients stay where they belong; at an odd edge codes may name no element at all."""
        op, inputs = self.hostile_plan(rng)
        inputs["y"] = values(rng, op.inputs["y"])
        inputs["dr"] = dr = special(rng, op.inputs["dr"])
        if "codes" not in op.inputs:
            return self.made(op, inputs, dr)
        codes = rng.integers(0, 4, dr.shape).astype(CODE)
        inputs["codes"] = by_hand.packed(codes)
        _, h, w, _ = op.inputs["y"].shape
        inputs["dr"] = dr.copy()
        dr[valid_codes(codes, (h, w)) != codes] = 0  # what belongs to no element is lost
        return self.made(op, inputs, by_hand.scatter(dr, codes, (h, w)))


def z_error(b: Buffers, eps: float) -> np.ndarray:
    return 4 * eps * (np.abs(b.y - b.mean) * b.inv_std * np.abs(b.weight) + np.abs(b.bias))


def neutral(op: Op) -> Inputs:
    """Inputs of 0, but gain 1: batch norm that changes nothing."""
    return {name: np.full(s.shape, int(name in ("inv_std", "weight")), s.dtype) for name, s in op.inputs.items()}


def packed(rng: np.random.Generator, pooled: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Random codes as a pool of a map of this size could have made them."""
    return pack_codes(valid_codes(rng.integers(0, 4, pooled).astype(CODE), size))


def special(rng: np.random.Generator, s: Spec) -> np.ndarray:
    """Hostile values, some of them or all of their kinds."""
    return rng.choice(by_hand.SPECIAL[: rng.integers(1, 8)], s.shape).astype(s.dtype)


_MAP_ROWS: tuple[tuple[Any, ...], ...] = (
    *((NormForwardRow, NormReluForward, relu) for relu in (True, False)),
    *((NormPoolRow, NormReluPoolForward, relu) for relu in (True, False)),
    *((NormBackwardRow, NormReluBackward), (NormBackwardRow, NormReluPoolBackward)),
    *((UnpoolRow, NormReluUnpoolForward, relu) for relu in (True, False)),
)
_OF_MAPS = [
    row(op, name=op.name + "_linear" * (relu == [False]) + end, elements=(np.dtype(element),), options=tuple(relu))
    for element, end in ((np.float32, ""), (BFLOAT16, "_bfloat16"))
    for row, op, *relu in _MAP_ROWS
]
_PLANES: dict[str, Any] = {"elements": (np.dtype(np.float32),), "in_planes": True, "exact": False}
_IN_PLANES = [
    row(op, name=f"{op.name}_planes", options=tuple(relu), **_PLANES) for row, op, *relu in _MAP_ROWS if relu != [False]
]
ROWS: tuple[Row, ...] = (MergeStatisticsRow(), MergeGradientsRow(), *_OF_MAPS, *_IN_PLANES)
