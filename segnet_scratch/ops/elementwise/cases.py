"""Rows of the ops that treat each element by itself."""

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops import by_hand
from segnet_scratch.ops.cases import MAPS, Bounds, Case, Hostile, Inputs, MapRow, Refusal, Shape, random_map, values
from segnet_scratch.ops.elementwise.add import AddForward
from segnet_scratch.ops.elementwise.dropout import DropoutForward
from segnet_scratch.ops.elementwise.relu import ReluBackward, ReluForward
from segnet_scratch.ops.op import Buffers, Op, spec, spec_of


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


ROWS = (AddRow(AddForward), ReluRow(ReluForward), ReluRow(ReluBackward), DropoutRow(DropoutForward))
