"""Rows of bilinear resizing, and of the augmentation of training batches."""

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.cases import Bounds, Case, Inputs, Refusal, Row, Shape, random_map, size_of_result
from segnet_scratch.ops.op import Buffers, Op, spec
from segnet_scratch.ops.resampling.augment import AugmentForward
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


Size = tuple[int, int]


class AugmentRow(Row):
    """Pictures of `sources`, scaled to the sizes of `scaled`, onto results of `size`; places and tones are drawn."""

    op = AugmentForward

    def cases(self) -> list[Case]:
        def case(reason: str, size: Size, sources: tuple[Size, ...], scaled: tuple[Size, ...]) -> Case:
            return Case(reason, {"size": size, "sources": sources, "scaled": scaled})

        return [
            case("size 1", (1, 1), ((1, 1),), ((1, 1),)),
            case("as it is", (5, 7), ((5, 7),), ((5, 7),)),
            case("grows", (12, 9), ((4, 3),), ((24, 18),)),
            case("shrinks: many taps", (6, 5), ((60, 45),), ((6, 5),)),
            case("shrinks in one direction, grows in the other", (8, 8), ((31, 3),), ((7, 11),)),
            case("smaller than the result: padded", (16, 16), ((9, 9),), ((5, 3),)),
            case("one pixel, spread out", (8, 9), ((1, 1),), ((13, 17),)),
            case("samples of several sizes", (13, 11), ((7, 5), (29, 23), (2, 40)), ((17, 13), (11, 19), (13, 12))),
            case("primes", (13, 11), ((29, 23),), ((17, 19),)),
            case("a pixel more than a block", (1, 257), ((3, 300),), ((2, 280),)),
            case("a picture of VOC to SegNet's input", (56, 56), ((94, 125),), ((61, 61),)),
        ]

    def random_case(self, rng: np.random.Generator) -> Case:
        n = int(rng.integers(1, 4))
        sources, scaled = (tuple((int(h), int(w)) for h, w in rng.integers(1, 40, (n, 2))) for _ in range(2))
        height, width = rng.integers(1, 25, 2)
        return Case("random", {"size": (int(height), int(width)), "sources": sources, "scaled": scaled})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        pixels = sum(h * w for h, w in case["sources"])
        return AugmentForward.plan(len(case["sources"]), pixels, case["size"], np.dtype(dtype))

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        sizes, scaled = np.array(case["sources"], np.int32), np.array(case["scaled"], np.int32)
        pixels, n, dtype = int(sizes.prod(1).sum()), len(sizes), op.inputs["tones"].dtype
        # Places from wholly before the picture to wholly behind it, most of them in between.
        room = scaled - np.array(case["size"])
        places = np.rint(room * rng.uniform(-0.2, 1.2, (n, 2))).astype(np.int32)
        flips = rng.integers(0, 2, (n, 1)).astype(np.int32)
        return {
            "images": rng.integers(0, 256, (pixels, 3), np.uint8),
            "masks": rng.integers(0, 256, pixels, np.uint8),
            "starts": np.cumsum([0, *sizes.prod(1)[:-1]], dtype=np.int64),
            "sizes": sizes,
            "views": np.concatenate([scaled, places, flips], axis=1, dtype=np.int32),
            "tones": np.stack([rng.uniform(0.5, 1.5, n), rng.uniform(-0.3, 0.3, n)], axis=1).astype(dtype),
            "channels": np.stack([rng.uniform(0.3, 0.6, 3), rng.uniform(0.2, 0.3, 3)]).astype(dtype),
        }

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        # A centre is rounded at eps times the side, which moves a weight by as much over the sum of all weights, 1 at
        # least in each direction; sums have at most (2 scale + 2)^2 positive terms. Values are at most 1 throughout.
        scale = np.maximum(1, b.sizes / b.views[:, :2])
        taps = (2 * scale + 2).prod(1)
        moved = (b.sizes * (2 * scale + 2) / scale).sum(1)
        error = 4 * eps * b.tones[:, 0] * (1 + moved + np.sqrt(taps))
        absolute = error + 4 * eps * (np.abs(b.tones).sum(1) + 1)
        allowed = absolute[:, None, None, None] / b.channels[1] + 2 * eps * np.abs(b.y)
        return {"y": np.where(b.y == 0, 0, allowed)}  # padding is exact


ROWS: tuple[Row, ...] = (ResizeRow(), ResizeBackwardRow(), AugmentRow())
