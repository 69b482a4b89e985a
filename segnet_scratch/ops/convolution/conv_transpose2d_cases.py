"""Rows of the transposed convolution: forward and both gradients, in each rung of conv2d, which does the work."""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.cases import Bounds, Case, Row, Shape, of_magnitudes, random_map, size_of_result
from segnet_scratch.ops.convolution.conv_transpose2d import (
    ConvTranspose2dBackwardData,
    ConvTranspose2dBackwardWeight,
    ConvTranspose2dForward,
)
from segnet_scratch.ops.op import Buffers, Op, spec
from segnet_scratch.ops.pooling.windows import windows_of


def _case(reason: str, y: tuple[int, ...], c: int) -> Case:
    return Case(reason, {"y": y, "c": c})


CASES = [
    _case("size 1: three of four pixels cropped", (1, 1, 1, 1), 1),
    _case("even", (2, 4, 6, 3), 2),
    _case("odd height", (1, 5, 6, 2), 3),
    _case("odd width", (1, 6, 7, 3), 4),
    _case("one row", (2, 1, 8, 2), 2),
    _case("one column", (1, 9, 1, 2), 5),
    _case("primes", (2, 13, 11, 7), 17),
    _case("channels of SegNet's first stage", (1, 10, 8, 64), 64),
    _case("more channels than a tile", (1, 3, 4, 33), 65),
]


class ConvTranspose2dRow(Row):
    """One direction in one rung; `terms` is the length of the sum behind an output."""

    exact = True
    terms: Callable[[Any], int]

    def cases(self) -> list[Case]:
        return CASES

    def random_case(self, rng: np.random.Generator) -> Case:
        return _case("random", random_map(rng), int(rng.integers(1, 40)))

    def chosen(self, x: Shape, weight: Shape = (), h: int = 0, w: int = 0, rung: str = "direct") -> Case:
        size = size_of_result(x, h, w)
        return Case("chosen", {"y": (x[0], *size, (weight or x)[-1]), "c": x[-1], "rung": rung})

    def arguments(self, case: Case, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().arguments(case, arrays), "size": case["y"][1:3]}

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        n, h, w, o = case["y"]
        x, weight = spec(windows_of(n, h, w, case["c"]), dtype), spec((case["c"], 4, 4, o), dtype)
        return self.op.plan(x, weight, (h, w), self.rung)

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        (output,) = op.outputs
        return {output: 2 * eps * sqrt(self.terms(op)) * getattr(of_magnitudes(op, b), output)}


_TERMS: dict[type[Op], Callable[[Any], int]] = {
    ConvTranspose2dForward: lambda op: 4 * op.x.shape[3],
    ConvTranspose2dBackwardData: lambda op: 16 * op.y.shape[3],
    ConvTranspose2dBackwardWeight: lambda op: op.x.size // op.x.shape[3],
}
ROWS = tuple(ConvTranspose2dRow(op, rung, terms=terms) for rung in ("direct", "tiled") for op, terms in _TERMS.items())
