"""Rows of the ops that treat each element by itself, and of arithmetic with broadcasting."""

from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops import by_hand
from segnet_scratch.ops.cases import (
    MAPS,
    Bounds,
    Case,
    Hostile,
    Inputs,
    MapRow,
    Refusal,
    Row,
    Shape,
    of_magnitudes,
    random_map,
    values,
)
from segnet_scratch.ops.elementwise.add import AddForward
from segnet_scratch.ops.elementwise.arithmetic import BINARY, UNARY, Arithmetic, Elementwise, SumBackward, SumForward
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.elementwise.dropout import DropoutForward
from segnet_scratch.ops.elementwise.relu import ReluBackward, ReluForward
from segnet_scratch.ops.op import Buffers, Op, spec, spec_of
from segnet_scratch.runtime.precision import BFLOAT16


class AddRow(MapRow):
    """One rounding."""

    def chosen(self, a: Shape) -> Case:
        return super().chosen(a)

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

    def chosen(self, x: Shape, p: float = 0.5) -> Case:
        return Case("chosen", {"x": x, "p": p, "layer": 1, "seed": 2**40, "step": 1001})

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
        wrong = {
            "p = 1": ("expected 0 <= p < 1", {"p": 1.0}),
            "p below 0": ("expected 0 <= p < 1", {"p": -0.1}),
            "p is NaN": ("p is nan", {"p": np.nan}),
            "one dimension": ("expected (n, ...)", {"x": spec((4,))}),
        }
        return self.refused({"x": spec((1, 4, 5, 3)), "p": 0.5, "layer": 0}, wrong)


ROUNDINGS = {"power": 16, "exp": 4, "log": 4}  # of CUDA's pow, exp and log (Programming Guide, 17.1); else one


class ArithmeticRow(Row):
    """One operation; what is repeated along which axes."""

    operation: str

    def cases(self) -> list[Case]:
        pairs = {
            "equal shapes, more than a block": ((3, 100), (3, 100)),
            "a number on the right": ((257,), ()),
            "a number on the left": ((1,), (16, 17)),
            "a value a channel": ((2, 3, 4, 5), (5,)),
            "a value a pixel": ((2, 3, 4, 1), (2, 3, 4, 5)),
            "a value an image and channel": ((2, 1, 1, 5), (2, 3, 4, 5)),
            "each repeated": ((7, 1), (1, 9)),
            "axes of size 1 between repeated ones": ((2, 1, 1, 1, 3), (2, 4, 1, 5, 3)),
        }
        return [Case(reason, {"a": a, "b": b}) for reason, (a, b) in pairs.items()]

    def random_case(self, rng: np.random.Generator) -> Case:
        shape = random_map(rng)
        start, stop = sorted(int(k) for k in rng.integers(0, 5, 2))
        repeated = (*shape[:start], *(1 for _ in shape[start:stop]), *shape[stop:])
        a, b = (shape, repeated) if rng.integers(2) else (repeated, shape)
        return Case("random", {"a": a, "b": b})

    def chosen(self, a: Shape, b: Shape = ()) -> Case:
        return Case("chosen", {"a": a, "b": b})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return Arithmetic.plan(spec(case["a"], dtype), spec(case["b"], dtype), self.operation)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        a, b = (values(rng, op.inputs[name], integers) for name in "ab")
        if self.operation == "divide":  # quotients without a remainder, where they are to be exact
            b = np.where(b < 0, -1, 1).astype(b.dtype) * (2 ** (np.abs(b) // 2) if integers else 0.5 + np.abs(b))
        if self.operation == "power":
            a = np.abs(a) + a.dtype.type(0.1)
        return {"a": np.asarray(a, op.inputs["a"].dtype), "b": np.asarray(b, op.inputs["b"].dtype)}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"y": ROUNDINGS.get(self.operation, 1) * eps * np.abs(b.y)}

    def refusals(self) -> list[Refusal]:
        wrong: dict[str, tuple[Any, ...]] = {
            "repeated along axes apart": ("axes apart", {"b": spec((1, 3, 1))}),
            "misfit": ("do not fit", {"b": spec((3,))}),
            "empty": ("do not fit", {"b": spec((0, 1, 1))}),
            "two types": ("convert one", {"b": spec((4,), np.float64)}, DTypeError),
            "unknown": ("'modulo'", {"operation": "modulo"}),
        }
        return self.refused({"a": spec((2, 3, 4)), "b": spec((2, 3, 4)), "operation": self.operation}, wrong)


class ElementwiseRow(MapRow):
    """exp of any number, log of those above 0."""

    exact = False
    operation: str

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        x = values(rng, op.inputs["x"], integers)
        return {"x": np.abs(x) + x.dtype.type(0.1) if self.operation == "log" else 3 * x}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        return {"y": ROUNDINGS[self.operation] * eps * np.abs(b.y) + (eps if self.operation == "log" else 0)}


class SumRow(Row):
    """The sum over the middle axis, or its gradient. In double, so that float32 is rounded once."""

    exact = True
    shapes: ClassVar = {
        "one element": (1, 1, 1),
        "nothing to add": (5, 1, 3),
        "a sum that one thread adds": (3, 256, 2),
        "short sums": (2, 12, 16),
        "two chunks": (2, 257, 1),
        "channels over pixels": (1, 1009, 21),
        "as many columns as a block has threads": (1, 300, 256),
        "a second group of columns": (2, 300, 257),
        "everything, in longer chunks": (1, 256 * 512 + 1, 1),
        "many short sums": (1000, 21, 1),
    }

    def random_case(self, rng: np.random.Generator) -> Case:
        outer, times, inner = (int(k) for k in rng.integers(1, (6, 2000, 40)))
        return Case("random", {"x": (outer, times, inner)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        outer, *summed, inner = case["x"]  # of a map, its height and width
        if self.op is SumForward:
            return SumForward.plan(spec((outer, prod(summed), inner), dtype))
        return SumBackward.plan(spec((outer, inner), dtype), prod(summed))

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        if self.op is SumBackward:
            return {}
        doubles = np.finfo(np.float64).eps * np.sqrt(b.x.shape[1]) * of_magnitudes(op, b).y
        return {"y": eps * np.abs(b.y) + 2 * doubles}

    def refusals(self) -> list[Refusal]:
        options = () if self.op is SumForward else (3,)
        flat, empty = spec((4,), np.float32), spec((2, 0, 3)[: 3 - len(options)], np.float32)
        return [
            Refusal("flat", lambda: self.op.plan(flat, *options), ShapeError, "expected (outer, "),
            Refusal("empty", lambda: self.op.plan(empty, *options), ShapeError, "is empty"),
        ]


class CastRow(MapRow):
    """One rounding to bfloat16, which is exact for small integers; back it is exact for all numbers."""

    def reference_plan(self, case: Case) -> Op:
        return self.plan(case, np.float32)


_KINDS = {name: {"constants": ("b",)} if name == "power" else {"exact": True} for name in BINARY}
ROWS: tuple[Row, ...] = (
    *(AddRow(AddForward), ReluRow(ReluForward), ReluRow(ReluBackward), DropoutRow(DropoutForward)),
    *(ArithmeticRow(Arithmetic, name=f"arithmetic_{k}", operation=k, **kind) for k, kind in _KINDS.items()),
    *(ElementwiseRow(Elementwise, name=f"elementwise_{name}", operation=name, options=(name,)) for name in UNARY),
    *(SumRow(SumForward), SumRow(SumBackward)),
    CastRow(Cast, name="cast_to_bfloat16", elements=(np.dtype(np.float32),)),
    CastRow(Cast, name="cast_from_bfloat16", elements=(BFLOAT16,)),
)
