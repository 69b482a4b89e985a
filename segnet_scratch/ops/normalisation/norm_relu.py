"""Batch norm with ReLU, max-pool and max-unpool for the fused engine (cuda/norm_relu.cu), and the merging of its sums.

Maps are float32 or bfloat16, numbers of channels float32. Maps and numbers of float64 are for the reference alone.
What Hopper's convolutions alone read of float32 is made in `planes` of bfloat16 (split_planes.py).
"""

from typing import ClassVar

import numpy as np

from segnet_scratch.ops.convolution.split_planes import in_planes, split, to_planes
from segnet_scratch.ops.normalisation.batch_norm import EPS, MOMENTUM
from segnet_scratch.ops.normalisation.batch_norm_ranks import merge_moments
from segnet_scratch.ops.op import Buffers, Op, Spec, expect, expect_array, expect_map
from segnet_scratch.ops.pieces import LOADS, MAP_THREADS, TILE_ROWS, expect_pieces, map_grid, rounded, tiles_of
from segnet_scratch.ops.pooling.packed_codes import gather_at, max_pool_packed, packed_codes, scatter_from, unpooled
from segnet_scratch.ops.pooling.windows import windows_of
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes

MERGE_CHANNELS, MERGE_LANES = 8, 64


class _Merge(Op):
    """Sums over the tiles of a convolution's epilogue."""

    def __init__(self, partials: Spec) -> None:
        expect_array(self.name, "partials", partials, "tiles, 2, c")
        expect(partials.shape[1] == 2, f"{self.name}: partials have shape {partials.shape}; expected (tiles, 2, c)")
        self.tiles, _, self.channels = partials.shape
        self.vector = Spec((self.channels,), partials.dtype)
        self.inputs = {"partials": partials}
        self.flops = 4 * partials.size

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, -(-self.channels // MERGE_CHANNELS), (MERGE_CHANNELS, MERGE_LANES))


class NormMergeStatistics(_Merge):
    """mean, inv_std (c) of y from partials (tiles, 2, c): mean and M2 of each 128 rows; running statistics in place.

    `counted`: not 128, but as many rows as the input `counts` (tiles) says, the first tile at least one.
    """

    name = "norm_merge_statistics"
    updates = ("running_mean", "running_var")

    def __init__(
        self, partials: Spec, rows: int, eps: float = EPS, momentum: float = MOMENTUM, counted: bool = False
    ) -> None:
        super().__init__(partials)
        expect(rows > 1, f"{self.name}: one value a channel; training needs n*h*w > 1: use a larger image or batch")
        tiles = tiles_of(rows)
        wrong = f"{self.name}: {rows} rows are {tiles} tiles of {TILE_ROWS}, partials have {self.tiles}"
        expect(counted or tiles == self.tiles, wrong)
        self.rows, self.eps, self.momentum = rows, eps, momentum
        self.inputs = {"partials": partials, "running_mean": self.vector, "running_var": self.vector}
        if counted:
            self.inputs["counts"] = Spec((self.tiles,), np.dtype(np.int32))
        self.outputs = {"mean": self.vector, "inv_std": self.vector}

    def reference(self, b: Buffers) -> None:
        counts = np.full((self.tiles, 1), float(TILE_ROWS))
        counts[-1] = self.rows - TILE_ROWS * (self.tiles - 1)
        if "counts" in self.inputs:
            counts = b.counts[:, None].astype(np.float64)
        merge_moments(self, b, counts, *b.partials.astype(np.float64).swapaxes(0, 1))


class NormMergeGradients(_Merge):
    """dweight, dbias (c) from partials (tiles, 2, c): the sums of dr and of dr xhat of each tile."""

    name = "norm_merge_gradients"

    def __init__(self, partials: Spec) -> None:
        super().__init__(partials)
        self.outputs = {"dweight": self.vector, "dbias": self.vector}

    def reference(self, b: Buffers) -> None:
        b.dbias[...], b.dweight[...] = b.partials.sum(0, dtype=np.float64)


class _OnMaps(Op):
    """Passes over y (n, h, w, c), a piece of channels a thread: of rows, or of the windows of `over`."""

    windows: ClassVar[bool] = True
    made: ClassVar[str] = "dy"  # the output that may be in planes
    resident: ClassVar[int] = 3
    vectors: ClassVar[tuple[str, ...]] = ("mean", "inv_std", "weight", "dweight", "dbias")  # inputs (c)

    def __init__(self, y: Spec, planes: int = 1) -> None:
        n, h, w, c = expect_map(self.name, "y", y, bfloat16=True)
        expect_pieces(self.name, y.dtype, channels=c)
        self.rows, self.channels, self.planes = n * h * w, c, planes
        vector = Spec((c,), ElementTypes.of(y.dtype).accumulate)
        self.inputs = {"y": y, **dict.fromkeys(self.vectors, vector)}
        self.outputs = {}
        self.flops = 4 * y.size

    def launch(self, device: Device, b: Buffers) -> None:
        grid = map_grid(device, getattr(b, self.over), 1 if self.windows else LOADS, self.resident)
        self.kernel(device, self.name, b, grid, MAP_THREADS, **to_planes(b, self.made, self.planes))


class _Forward(_OnMaps):
    vectors = ("mean", "inv_std", "weight", "bias")

    def __init__(self, y: Spec, relu: bool = True, planes: int = 1) -> None:
        super().__init__(y, planes)
        self.relu = relu

    def normalised(self, b: Buffers) -> np.ndarray:
        """By its definition."""
        z = b.y if b.mean is None else (b.y - b.mean) * (b.inv_std * b.weight) + b.bias
        return np.where(z <= 0, 0, z).astype(z.dtype) if self.relu else z


class NormReluForward(_Forward):
    """z = relu((y - mean) inv_std weight + bias). y, z (n, h, w, c), the others (c); `relu` False leaves it out."""

    name, over, windows, made = "norm_relu_forward", "y", False, "z"

    def __init__(self, y: Spec, relu: bool = True, planes: int = 1) -> None:
        super().__init__(y, relu, planes)
        self.outputs = {"z": in_planes(y, planes)}

    def reference(self, b: Buffers) -> None:
        split(self.normalised(b), b.z)


class NormReluPoolForward(_Forward):
    """`pooled` (n, ceil(h/2), ceil(w/2), c), the 2x2 max-pool of z (see NormReluForward), and its packed `codes`.

    `chosen`, of the size of `pooled`: y at the positions that the pool chose, for the backward pass of the ReLU.
    """

    name, over, made = "norm_relu_pool_forward", "chosen", "pooled"

    def __init__(self, y: Spec, relu: bool = True, planes: int = 1) -> None:
        super().__init__(y, relu, planes)
        pooled = y.with_shape(*windows_of(*y.shape))
        self.outputs = {"pooled": in_planes(pooled, planes), "codes": packed_codes(pooled.shape), "chosen": pooled}

    def reference(self, b: Buffers) -> None:
        pooled = np.empty_like(b.chosen)
        max_pool_packed(rounded(self.normalised(b), self.inputs["y"].dtype), pooled, b.codes)
        split(pooled, b.pooled)
        b.chosen[...] = gather_at(b.y, b.codes)


class NormReluUnpoolForward(_Forward):
    """`unpooled` (n, h, w, c), the max-unpool by packed `codes` of z (see NormReluForward); `size` is (h, w).

    y (n, ceil(h/2), ceil(w/2), c). Without mean, inv_std, weight and bias z is y, or its ReLU.
    """

    name, over, made, optional = "norm_relu_unpool_forward", "y", "unpooled", _Forward.vectors

    def __init__(self, y: Spec, size: tuple[int, int], relu: bool = True, planes: int = 1) -> None:
        super().__init__(y, relu, planes)
        self.size = size
        self.inputs["codes"] = packed_codes(y.shape)
        self.outputs = {"unpooled": in_planes(unpooled(self.name, y, size), planes)}

    def reference(self, b: Buffers) -> None:
        split(scatter_from(self.normalised(b), b.codes, self.size), b.unpooled)


class NormReluBackward(_OnMaps):
    """`dr` (n, h, w, c), the gradient before the ReLU, becomes the gradient of y, in place; in planes that is `dy`."""

    name, over, windows, resident = "norm_relu_backward", "y", False, 2

    def __init__(self, y: Spec, planes: int = 1) -> None:
        super().__init__(y, planes)
        self.inputs["dr"] = y
        if planes == 1:
            self.updates = ("dr",)
        else:
            self.outputs = {"dy": in_planes(y, planes)}

    def reference(self, b: Buffers) -> None:
        split(_backward(b, b.dr, self.rows), b.dr if self.updates else b.dy)


class NormReluPoolBackward(_OnMaps):
    """dy (n, h, w, c) from the gradient `dr` before the ReLU of a pooled block, at the elements that `codes` names."""

    name, over, resident = "norm_relu_pool_backward", "dr", 2

    def __init__(self, y: Spec, planes: int = 1) -> None:
        super().__init__(y, planes)
        pooled = windows_of(*y.shape)
        self.inputs |= {"codes": packed_codes(pooled), "dr": y.with_shape(*pooled)}
        self.outputs = {"dy": in_planes(y, planes)}

    def reference(self, b: Buffers) -> None:
        split(_backward(b, scatter_from(b.dr, b.codes, b.y.shape[1:3]), self.rows), b.dy)


def _backward(b: Buffers, dr: np.ndarray, rows: int) -> np.ndarray:
    xhat = (b.y - b.mean) * b.inv_std
    return b.weight * b.inv_std * (dr - b.dbias / rows - xhat * (b.dweight / rows))
