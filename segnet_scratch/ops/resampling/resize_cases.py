"""Rows of bilinear resizing."""

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.cases import Bounds, Case, Refusal, Row, Shape, random_map, size_of_result
from segnet_scratch.ops.op import Buffers, Op, spec
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearBackward, ResizeBilinearForward


class ResizeRow(Row):
    """Bilinear resize to `size`."""

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

    def chosen(self, x: Shape, h: int = 0, w: int = 0) -> Case:
        return Case("chosen", {"x": x, "size": size_of_result(x, h, w)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return ResizeBilinearForward.plan(spec(case["x"], dtype), case["size"])

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # A source position near h is rounded at eps h, and y changes by at most twice the largest value a pixel.
        positions = 1 + b.x.shape[1] + b.x.shape[2]
        return {"y": 4 * eps * positions * np.abs(b.x).max((1, 2), keepdims=True)}

    def refusals(self) -> list[Refusal]:
        forward = self.op is ResizeBilinearForward
        wrong = {
            "size 0": ("positive", {"size": (0, 4)}),
            "three dimensions": ("channels last", {"x" if forward else "dy": spec((4, 5, 3))}),
        }
        return self.refused({"x" if forward else "dy": spec((1, 4, 5, 3)), "size": (4, 4)}, wrong)


class ResizeBackwardRow(ResizeRow):
    """Its gradient: dy has the forward's `size`."""

    op = ResizeBilinearBackward

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        n, h, w, c = case["x"]
        return ResizeBilinearBackward.plan(spec((n, *case["size"], c), dtype), (h, w))

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # A weight is off by eps h, as in the forward, in every output that a pixel takes part in.
        (h, w), (oh, ow) = b.dx.shape[1:3], b.dy.shape[1:3]
        terms = (2 * oh / h + 2) * (2 * ow / w + 2)
        return {"dx": 4 * eps * (1 + h + w) * terms * np.abs(b.dy).max((1, 2), keepdims=True)}


ROWS = ResizeRow(), ResizeBackwardRow()
