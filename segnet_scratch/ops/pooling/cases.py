"""Rows of max-pool and unpool, forward and backward."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops import by_hand
from segnet_scratch.ops.cases import Case, Hostile, Inputs, MapRow, Refusal, Shape, size_of_result, values
from segnet_scratch.ops.op import Op, Spec, spec, spec_of
from segnet_scratch.ops.pooling.max_pool import MaxPoolBackward, MaxPoolForward, MaxPoolScalar
from segnet_scratch.ops.pooling.max_unpool import MaxUnpoolBackward, MaxUnpoolForward, MaxUnpoolScalar
from segnet_scratch.ops.pooling.windows import CODE, PoolCodes, valid_codes, windows_of


class MaxPoolRow(MapRow):
    """The code is always a valid position, whatever is in the window."""

    def hostile(self, rng: np.random.Generator) -> Hostile:
        shape = rng.integers(1, (3, 6, 6, 9))
        x = rng.choice(by_hand.SPECIAL[: rng.integers(1, 8)], shape).astype(np.float32)
        y, codes = by_hand.pool(x)
        return Hostile(self.op.plan(spec_of(x)), {"x": x}, {"y": y, "codes": codes})

    def refusals(self) -> list[Refusal]:
        return self.refused({}, {"three dimensions": ("channels last", {"x": spec((4, 5, 3))})})


class WindowRow(MapRow):
    """Backward of the pool, and both directions of the unpool: values move to or from valid positions."""

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        n, h, w, c = case["x"]
        windows = spec(windows_of(n, h, w, c), dtype)
        if self.op is MaxPoolBackward:
            return MaxPoolBackward.plan(windows, (h, w))
        if self.op is MaxUnpoolBackward:
            return MaxUnpoolBackward.plan(spec(case["x"], dtype))
        return self.op.plan(windows, Spec(windows.shape, CODE), (h, w))

    def chosen(self, x: Shape, h: int = 0, w: int = 0) -> Case:
        return Case("chosen", {"x": (x[0], *size_of_result(x, h, w), x[-1])})

    def arguments(self, case: Case, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {**arrays, "codes": PoolCodes(arrays["codes"], case["x"][1:3])}

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = {name: values(rng, s, integers) for name, s in op.inputs.items() if name != "codes"}
        codes = rng.integers(0, 4, op.inputs["codes"].shape, CODE)
        return {**arrays, "codes": valid_codes(codes, case["x"][1:3])}

    def hostile(self, rng: np.random.Generator) -> Hostile:
        """Codes that point outside of the map, or are none; values with NaN, infinities and ties."""
        n, h, w, c = (int(k) for k in rng.integers(1, (3, 6, 6, 9)))
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
        windows, two_dimensions = spec((1, 2, 3, 3)), ("channels last", {"dy": spec((2, 3))})
        if self.op is MaxUnpoolBackward:
            return self.refused({}, {"two dimensions": two_dimensions})
        if self.op is MaxPoolBackward:
            wrong = {"two dimensions": two_dimensions, "another size": ("do not fit", {"size": (5, 5)})}
            return self.refused({"dy": windows, "size": (4, 5)}, wrong)
        wrong = {
            "another size": ("do not fit", {"size": (4, 7)}),
            "size 0": ("do not fit", {"size": (0, 0)}),
            "codes of another pool": ("pass the codes of the pool", {"values": spec((1, 4, 5, 3))}),
        }
        return self.refused({"values": windows, "codes": Spec(windows.shape, CODE), "size": (4, 5)}, wrong)


# A rung that moves one number at a time is a row of its own.
ROWS = (
    *(MaxPoolRow(MaxPoolForward), MaxPoolRow(MaxPoolScalar, "scalar", function="")),
    *map(WindowRow, (MaxPoolBackward, MaxUnpoolForward, MaxUnpoolBackward)),
    WindowRow(MaxUnpoolScalar, "scalar", function=""),
)
