"""Rows of the ops that treat each element, or each window, of a map by itself."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import ShapeError
from segnet_scratch.ops.dropout import DropoutForward
from segnet_scratch.ops.max_pool import MaxPoolBackward, MaxPoolForward
from segnet_scratch.ops.max_unpool import MaxUnpoolBackward, MaxUnpoolForward
from segnet_scratch.ops.op import Buffers, Op, Spec, spec, spec_of
from segnet_scratch.ops.relu import ReluBackward, ReluForward
from segnet_scratch.ops.resize_bilinear import ResizeBilinearBackward, ResizeBilinearForward
from segnet_scratch.ops.windows import CODE, valid_codes, windows_of
from segnet_scratch.proof.rows import by_hand
from segnet_scratch.proof.rows.base import MAPS, Bounds, Case, Hostile, Inputs, Refusal, Row, maps, random_map, values


class MapRow(Row):
    """Ops on one map, without sums unless `bound` says otherwise; `options` are further arguments of the plan."""

    exact = True

    def __init__(self, op: type[Op], *options: Any) -> None:
        self.op, self.name, self.options = op, op.name, options

    def cases(self) -> list[Case]:
        return maps(MAPS)

    def random_case(self, rng: np.random.Generator) -> Case:
        return Case("random", {"x": random_map(rng)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec(case["x"], dtype), *self.options)

    def refusals(self) -> list[Refusal]:
        empty = spec((2, 0), np.float32)
        return [Refusal("empty", lambda: self.op.plan(empty, *self.options), ShapeError, "empty")]


class AddRow(MapRow):
    """One rounding."""

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"y": eps * np.abs(b.y)}


class ReluRow(MapRow):
    """Both directions; NaN and infinity pass, or are stopped, like any other number."""

    def hostile(self, rng: np.random.Generator) -> Hostile:
        first = rng.choice(by_hand.SPECIAL, rng.integers(1, (4, 40))).astype(np.float32)
        op = self.op.plan(spec_of(first))
        if self.op is ReluForward:
            y = [[v if v != v or v > 0 else 0 for v in row] for row in first]
            return Hostile(op, {"x": first}, {"y": np.array(y, np.float32)})
        assert self.op is ReluBackward
        dy = rng.choice(by_hand.SPECIAL, first.shape).astype(np.float32)
        dx = [[d if v > 0 else 0 for v, d in zip(*rows, strict=True)] for rows in zip(first, dy, strict=True)]
        return Hostile(op, {"y": first, "dy": dy}, {"dx": np.array(dx, np.float32)})


class MaxPoolRow(MapRow):
    """The code is always a valid position, whatever is in the window."""

    def hostile(self, rng: np.random.Generator) -> Hostile:
        x = rng.choice(by_hand.SPECIAL[: rng.integers(1, 8)], rng.integers(1, (3, 6, 6, 4))).astype(np.float32)
        y, codes = by_hand.pool(x)
        return Hostile(MaxPoolForward.plan(spec_of(x)), {"x": x}, {"y": y, "codes": codes})

    def refusals(self) -> list[Refusal]:
        flat = spec((4, 5, 3), np.float32)
        return [Refusal("three dimensions", lambda: MaxPoolForward(flat), ShapeError, "channels last")]


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
        return Case("random", {"x": random_map(rng), "p": p, "layer": layer, "seed": seed, "step": step})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return DropoutForward.plan(spec(case["x"], dtype), case["p"], case["layer"])

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        state = np.array([case["seed"], case["step"]], np.uint64)
        return {"x": values(rng, op.inputs["x"], integers), "state": state}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"y": 2 * eps * np.abs(b.y)}

    def refusals(self) -> list[Refusal]:
        x, vector = spec((1, 4, 5, 3), np.float32), spec((4,), np.float32)
        range_ = "expected 0 <= p < 1"
        return [
            Refusal("p = 1", lambda: DropoutForward(x, 1.0, 0), ShapeError, range_),
            Refusal("p below 0", lambda: DropoutForward(x, -0.1, 0), ShapeError, range_),
            Refusal("p is NaN", lambda: DropoutForward(x, np.nan, 0), ShapeError, "p is nan"),
            Refusal("one dimension", lambda: DropoutForward(vector, 0.5, 0), ShapeError, "expected (n, ...)"),
        ]


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

    def hostile(self, rng: np.random.Generator) -> Hostile:
        """Codes that point outside of the map, or are none; values with NaN, infinities and ties."""
        n, h, w, c = (int(k) for k in rng.integers(1, (3, 6, 6, 4)))
        windows = windows_of(n, h, w, c)
        codes = rng.integers(0, rng.choice([4, 8, 256]), windows).astype(CODE)
        gathers = self.op is MaxUnpoolBackward
        values = rng.choice(by_hand.SPECIAL, (n, h, w, c) if gathers else windows).astype(np.float32)
        result = by_hand.gather(values, codes) if gathers else by_hand.scatter(values, codes, (h, w))
        op = self.plan(Case("hostile", {"x": (n, h, w, c)}), np.float32)
        (name,) = (name for name in op.inputs if name != "codes")
        (output,) = op.outputs
        return Hostile(op, {name: values, "codes": codes}, {output: result})

    def refusals(self) -> list[Refusal]:
        x, windows, codes = spec((1, 4, 5, 3), np.float32), spec((1, 2, 3, 3), np.float32), Spec((1, 2, 3, 3), CODE)
        flat = spec((2, 3), np.float32)
        if self.op is MaxPoolBackward:
            return [
                Refusal("two dimensions", lambda: MaxPoolBackward(flat, (4, 5)), ShapeError, "channels last"),
                Refusal("another size", lambda: MaxPoolBackward(windows, (5, 5)), ShapeError, "do not fit"),
            ]
        if self.op is MaxUnpoolBackward:
            return [Refusal("two dimensions", lambda: MaxUnpoolBackward(flat), ShapeError, "channels last")]
        other = "pass the codes of the pool"
        return [
            Refusal("another size", lambda: MaxUnpoolForward(windows, codes, (4, 7)), ShapeError, "do not fit"),
            Refusal("size 0", lambda: MaxUnpoolForward(windows, codes, (0, 0)), ShapeError, "do not fit"),
            Refusal("codes of another pool", lambda: MaxUnpoolForward(x, codes, (4, 5)), ShapeError, other),
        ]


class ResizeRow(Row):
    """Bilinear resize to `size`."""

    name = "resize_bilinear_forward"
    op: type[Op] = ResizeBilinearForward

    def cases(self) -> list[Case]:
        sizes: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
            "size 1": ((1, 1, 1, 1), (1, 1)),
            "one pixel spread out": ((1, 1, 1, 3), (5, 4)),
            "to one pixel": ((2, 6, 5, 2), (1, 1)),
            "equal sizes": ((1, 5, 7, 3), (5, 7)),
            "twice as large": ((2, 4, 6, 4), (8, 12)),
            "twice as large, to odd sizes": ((2, 4, 3, 5), (7, 5)),
            "half as large": ((1, 8, 6, 3), (4, 3)),
            "primes": ((1, 13, 11, 17), (29, 23)),
            "from SegNet's input size to an image of VOC": ((1, 36, 48, 21), (50, 37)),
        }
        return [Case(reason, {"x": x, "size": size}) for reason, (x, size) in sizes.items()]

    def random_case(self, rng: np.random.Generator) -> Case:
        height, width = rng.integers(1, 40, 2)
        return Case("random", {"x": random_map(rng), "size": (int(height), int(width))})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return ResizeBilinearForward.plan(spec(case["x"], dtype), case["size"])

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # A source position near h is rounded at eps h, and y changes by at most twice the largest value a pixel.
        positions = 1 + b.x.shape[1] + b.x.shape[2]
        return {"y": 4 * eps * positions * np.abs(b.x).max((1, 2), keepdims=True)}

    def refusals(self) -> list[Refusal]:
        x, flat = spec((1, 4, 5, 3), np.float32), spec((4, 5, 3), np.float32)
        return [
            Refusal("size 0", lambda: ResizeBilinearForward(x, (0, 4)), ShapeError, "positive"),
            Refusal("three dimensions", lambda: ResizeBilinearForward(flat, (4, 4)), ShapeError, "channels last"),
        ]


class ResizeBackwardRow(ResizeRow):
    """Its gradient: dy has the forward's `size`."""

    name = "resize_bilinear_backward"
    op = ResizeBilinearBackward

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        n, h, w, c = case["x"]
        return ResizeBilinearBackward.plan(spec((n, *case["size"], c), dtype), (h, w))

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # A weight is off by eps h, as in the forward, in every output that a pixel takes part in.
        (h, w), (oh, ow) = b.dx.shape[1:3], b.dy.shape[1:3]
        terms = (2 * oh / h + 2) * (2 * ow / w + 2)
        return {"dx": 4 * eps * (1 + h + w) * terms * np.abs(b.dy).max((1, 2), keepdims=True)}
