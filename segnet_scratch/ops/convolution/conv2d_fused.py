"""Convolutions of the fused engine (cuda/conv2d_fused.cu): with bias, ReLU, pool and the sums of batch norm.

Stride 1, odd kernels, padding that keeps the size; arrays of the rung ("tf32", "tf32x3": float32, "bf16": bfloat16).
Statistics, bias and batch norm are float32, or float64 with maps of float64, for which there is no kernel: such a plan
is for the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution import fast
from segnet_scratch.ops.convolution.conv2d import Conv2dForward
from segnet_scratch.ops.convolution.conv2d_geometry import Cut, Geometry
from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect, expect_map, expect_type, spec_of
from segnet_scratch.ops.pieces import PIECE_BYTES, TILE_ROWS, expect_pieces, piece_of, rounded, tiles_of
from segnet_scratch.ops.pooling.packed_codes import gather_at, max_pool_packed, packed_codes
from segnet_scratch.ops.pooling.windows import windows_of
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.precision import ELEMENTS_OF_RUNG, round_to_tf32

Size = tuple[int, int]
MULTIPROCESSORS = 132  # of an H100: what follows from the shape must not depend on the GPU at hand
LEAST_PARTS = 8  # stages of the pipeline in a chunk of the depth


class FusedConv(Op):
    """What fprop and dgrad share: an implicit GEMM, `product`, whose rows may go by the four of each 2x2 window."""

    forward: ClassVar[bool]

    def __init__(self, map_: Spec, full: tuple[int, ...], weight: Spec, rung: str, by_windows: bool) -> None:
        expect_map(self.name, "the map", map_, bfloat16=True)
        expect_map(self.name, "weight", weight, bfloat16=True)
        _, kh, kw, _ = weight.shape
        odd = f"{self.name}: weight has shape {weight.shape}; expected (o, kh, kw, c) with odd kh and kw"
        expect(kh % 2 == kw % 2 == 1, f"{odd}, which keep the size")
        expect(kh == kw, f"{self.name}: the kernel is {kh}x{kw}; expected a square one")
        if weight.dtype != map_.dtype:
            raise DTypeError(f"{self.name}: weight has element type {weight.dtype}, the map {map_.dtype}; convert one")
        if rung not in ELEMENTS_OF_RUNG:
            raise DTypeError(f"{self.name}: there is no rung {rung!r}; expected one of {', '.join(ELEMENTS_OF_RUNG)}")
        expect_type(self.name, "the map", map_.dtype, ELEMENTS_OF_RUNG[rung], np.float64)
        self.geometry = Geometry.of(full, weight.shape, 1, kh // 2)
        reason = mma.unsupported_reason(self.geometry)
        expect(reason is None, f"{self.name}: {reason}")
        self.dtype, self.rung, self.by_windows = map_.dtype, rung, by_windows
        self.vector = np.dtype(np.float64) if self.dtype == np.float64 else np.dtype(np.float32)
        self.flops = self.geometry.flops
        g = self.product = self.geometry if self.forward else self.geometry.mirrored
        windows = windows_of(*g.y)
        self.out = windows if by_windows else g.y
        self.rows = 4 * prod(windows[:3]) if by_windows else g.pixels
        self.tiles = tiles_of(self.rows)
        self.default_tile = mma.forward_tile(g, rung)

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.named(self.rung)

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.product
        tile = mma.chosen(device, self.name.removeprefix("conv2d_"), self.rung, g, self.default_tile)
        sizes = {**g.sizes, "tiles": self.tiles}
        down, across = tile.grid(self.rows, g.o)
        if tile is mma.ELEMENTS:  # its blocks go from tile to tile, on the host, too
            resident = mma.RESIDENT_ELEMENTS[self.rung] * device.multiprocessors if device.gpu else 2
            down = min(down, max(1, resident // across))
        tile.launch(self, device, self.name, self.rung, b, (down, across), **sizes)

    def reference(self, b: Buffers) -> None:
        self._compute(b, plain_forward)

    def numpy(self, b: Buffers) -> None:
        self._compute(b, self._fast_forward)

    def _compute(self, b: Buffers, convolve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        raise NotImplementedError

    def _fast_forward(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        y = np.empty((*x.shape[:3], weight.shape[0]), x.dtype)
        fast.forward(self._factor(x), self._factor(weight), None, y, 1, weight.shape[1] // 2)
        return y

    def _factor(self, array: np.ndarray) -> np.ndarray:
        """What the rung multiplies."""
        return round_to_tf32(array) if self.rung == "tf32" else array

    def _vectors(self, channels: int, *names: str) -> dict[str, Spec]:
        return {name: Spec((channels,), self.vector) for name in names}

    def summed_together(self, map_: np.ndarray) -> Sequence[np.ndarray]:
        """The (pixels, channels), of a map like the result, that each of `partials` is about."""
        rows = TILE_ROWS if self.forward or not self.by_windows else TILE_ROWS // 4  # a window is four rows
        flat = map_.reshape(-1, map_.shape[-1])
        return [flat[start : start + rows] for start in range(0, len(flat), rows)]


def split_of(g: Geometry, rows: int, itemsize: int) -> Cut | None:
    """How the depth of a convolution is split, in stages of the pipeline, where its tiles would leave a GPU idle.

    For so many rows of the matrix product; None where it is not worth it: writing the sums is to stay small beside
    making them.
    """
    down, across = mma.MEDIUM.grid(rows, g.o)
    parts = -(-g.depth * itemsize // mma.MEDIUM.DEPTH_BYTES)
    wanted = min(parts // LEAST_PARTS, MULTIPROCESSORS // (down * across))
    return None if wanted < 2 or g.c * itemsize % PIECE_BYTES else Cut.of(parts, wanted)


class FusedForward(FusedConv):
    """y = [pool] [relu] (x * weight [+ bias]), and the statistics that batch norm needs of y.

    x (n, h, w, c), weight (o, k, k, c). `statistics`: also partials (tiles, 2, o), of each 128 pixels of y the mean and
    the sum of squared distances from it. `bias`: (o) is added. `pool`: y is (n, ceil(h/2), ceil(w/2), o), with packed
    `pool_codes`.
    """

    name, forward = "conv2d_fused_forward", True

    def __init__(
        self,
        x: Spec,
        weight: Spec,
        rung: str,
        statistics: bool = False,
        bias: bool = False,
        relu: bool = False,
        pool: bool = False,
    ) -> None:
        super().__init__(x, x.shape, weight, rung, pool)
        g, bare = self.geometry, not (bias or relu or pool)
        expect(bare or not statistics, f"{self.name}: statistics are those of the bare convolution")
        expect_pieces(self.name, ELEMENTS_OF_RUNG[rung], outputs=g.o)
        self.statistics, self.relu, self.pool = statistics, relu, pool
        self.inputs = {"x": x, "weight": weight}
        if bias:
            self.inputs |= self._vectors(g.o, "bias")
        self.split = split_of(g, self.rows, x.dtype.itemsize) if bias else None
        if self.split is not None:
            self.workspace = {"sums": Spec((self.split.count, self.rows, g.o), self.vector)}
        self.outputs = {"y": x.with_shape(*self.out)}
        if statistics:
            self.outputs["partials"] = Spec((self.tiles, 2, g.o), self.vector)
        if pool:
            self.outputs["pool_codes"] = packed_codes(self.out)

    def launch(self, device: Device, b: Buffers) -> None:
        if self.split is None:
            super().launch(device, b)
            return
        g, tile, sums = self.product, mma.MEDIUM, {"oh": self.geometry.oh, "ow": self.geometry.ow, "partials": b.sums}
        grid, parts = (*tile.grid(self.rows, g.o), self.split.count), {"parts_per_chunk": self.split.each}
        tile.launch(self, device, "conv2d_fused_split", self.rung, b, grid, **parts, **g.sizes, partials=b.sums)
        pieces = element_grid(b.y.size // piece_of(self.dtype))
        self.kernel(device, "conv2d_fused_merge", b, pieces, with_relu=int(self.relu), **sums)

    def _compute(self, b: Buffers, convolve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        y = convolve(b.x, b.weight)
        if hasattr(b, "bias"):
            y = y + b.bias
        y = rounded(y, self.dtype)
        if self.relu:
            y = np.where(y <= 0, 0, y).astype(y.dtype)
        if self.pool:
            max_pool_packed(y, b.y, b.pool_codes)
            return
        b.y[...] = y
        if self.statistics:
            for tile, rows in enumerate(self.summed_together(b.y)):
                b.partials[tile, 0] = rows.mean(0) if len(rows) else 0
                b.partials[tile, 1] = ((rows - b.partials[tile, 0]) ** 2).sum(0)


@dataclass(frozen=True)
class Below:
    """The block below a convolution: y (n, h, w, c) before its batch norm, of a pool where it chose; with a ReLU?"""

    y: Spec
    relu: bool = True

    VECTORS: ClassVar[tuple[str, ...]] = ("mean", "inv_std", "bn_weight", "bn_bias")


class FusedBackwardData(FusedConv):
    """dr, the gradient before the ReLU of the block below, and the sums that its batch norm needs.

    dy (n, h, w, o) is the gradient of the convolution's output, `flipped` (c, k, k, o) its weight as dgrad takes it.
    The input of the convolution was the output of the block below, `below`; or with `unpool` = (h, w) its unpooled
    output, and dr has the size of before. Where the block ends in a pool, dr is that of the pooled map, and y the
    `chosen` of NormReluPoolForward. partials (tiles, 2, c): of each 128 rows the sums of dr and of dr xhat.
    """

    name, forward = "conv2d_fused_backward_data", False

    def __init__(self, dy: Spec, weight: Spec, below: Below, rung: str, unpool: Size | None = None) -> None:
        n, h, w, _ = expect_map(self.name, "dy", dy, bfloat16=True)
        super().__init__(dy, (n, h, w, weight.shape[3]), weight, rung, unpool is not None)
        g = self.geometry
        expect_pieces(self.name, ELEMENTS_OF_RUNG[rung], channels=g.c, outputs=g.o)
        self.below, self.unpool, self.below_relu = below, unpool, below.relu
        output = below.y.shape
        expect(
            output == tuple(self.out) and dy.shape == g.y and unpool in (None, (h, w)),
            f"{self.name}: the block below gives {output}, the convolution takes {self.out} and gives {dy.shape}",
        )
        self.inputs = {"dy": dy, "flipped": dy.with_shape(g.c, g.kh, g.kw, g.o), "below_y": below.y}
        self.inputs |= self._vectors(g.c, *Below.VECTORS)
        if unpool is not None:
            self.inputs["unpool_codes"] = packed_codes(self.out)
        self.outputs = {"dr": dy.with_shape(*self.out), "partials": Spec((self.tiles, 2, g.c), self.vector)}

    def _compute(self, b: Buffers, convolve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        gradient, y = rounded(convolve(b.dy, self.flipped(b)), self.dtype), b.below_y
        if self.unpool is not None:
            gradient = gather_at(gradient, b.unpool_codes)
        xhat = (y - b.mean) * b.inv_std
        if self.below.relu:
            passes = (y - b.mean) * (b.inv_std * b.bn_weight) + b.bn_bias > 0
            gradient = np.where(passes, gradient, 0)
        b.dr[...] = gradient
        for number, term in enumerate((gradient, gradient * xhat)):
            for tile, part in enumerate(self.summed_together(term)):
                b.partials[tile, number] = part.sum(0)

    def flipped(self, b: Buffers) -> np.ndarray:
        """The weight (c, k, k, o) as dgrad takes it."""
        return b.flipped


def plain_forward(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The convolution by its definition, of the size of x."""
    op = Conv2dForward.plan(spec_of(x), spec_of(weight), 1, weight.shape[1] // 2, "direct")
    y = np.empty(op.geometry.y, x.dtype)
    op.reference(Buffers(x=x, weight=weight, bias=None, y=y))
    return y
