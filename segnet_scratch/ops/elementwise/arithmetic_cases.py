"""Rows of arithmetic with broadcasting."""

from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.cases import (
    Bounds,
    Case,
    Inputs,
    MapRow,
    Refusal,
    Row,
    Shape,
    of_magnitudes,
    random_map,
    values,
)
from segnet_scratch.ops.elementwise.arithmetic import BINARY, UNARY, Arithmetic, Elementwise, SumBackward, SumForward
from segnet_scratch.ops.op import Buffers, Op, spec

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


_KINDS = {name: {"constants": ("b",)} if name == "power" else {"exact": True} for name in BINARY}
ROWS = (
    *(ArithmeticRow(Arithmetic, name=f"arithmetic_{k}", operation=k, **kind) for k, kind in _KINDS.items()),
    *(ElementwiseRow(Elementwise, name=f"elementwise_{name}", operation=name, options=(name,)) for name in UNARY),
    *(SumRow(SumForward), SumRow(SumBackward)),
)
