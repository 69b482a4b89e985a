"""Which kernels compute a convolution of the fused engine: Hopper's where device and shape allow, else mma.sync."""

from dataclasses import dataclass
from typing import Any

from segnet_scratch.ops.convolution import conv2d_hopper as hopper
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardWeight
from segnet_scratch.ops.convolution.conv2d_fused import Below, FusedBackwardData, FusedForward, Size
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.ops.convolution.split_planes import PLANES, in_planes
from segnet_scratch.ops.convolution.tile_table import TileTable
from segnet_scratch.ops.op import Spec, spec
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.precision import ELEMENTS_OF_RUNG


@dataclass(frozen=True)
class Convolutions:
    """Plans the convolutions of a program.

    `tiles` is what was measured on a device that computes with Hopper's kernels; None: with those of mma.sync alone.
    """

    rung: str
    tiles: TileTable | None = None

    @staticmethod
    def on(device: Device, rung: str) -> "Convolutions":
        """For a device."""
        return Convolutions(rung, hopper.tiles_on(device))

    def _fits(self, x: tuple[int, ...], weight: Spec) -> bool:
        g = Geometry.of(x, weight.shape, 1, weight.shape[1] // 2)
        return self.tiles is not None and hopper.unsupported_reason(g) is None

    def forward(self, x: Spec, weight: Spec, **options: Any) -> FusedForward:
        """fprop, with the options of FusedForward."""
        portable = FusedForward.plan(x, weight, self.rung, **options)
        # A map so small that its depth is split stays with the kernels that split it.
        if portable.split is not None or not self._fits(x.shape, weight):
            return portable
        return hopper.HopperForward.plan(x, weight, self.rung, **options).in_best_tile(self.tiles)

    def backward_data(self, dy: Spec, weight: Spec, below: Below, unpool: Size | None) -> FusedBackwardData:
        """dgrad; whether it takes the weight or its flipped copy, `inputs` says, as `needs_flipped` does."""
        if not self._fits((*dy.shape[:3], weight.shape[3]), weight):
            return FusedBackwardData.plan(dy, weight, below, self.rung, unpool)
        return hopper.HopperBackwardData.plan(dy, weight, below, self.rung, unpool).in_best_tile(self.tiles)

    def backward_weight(self, x: Spec, weight: Spec) -> Conv2dBackwardWeight:
        """wgrad."""
        if self._fits(x.shape, weight):
            return hopper.HopperBackwardWeight.plan(x, weight, self.rung)
        return Conv2dBackwardWeight.plan(x, weight, 1, weight.shape[1] // 2, self.rung)

    def needs_flipped(self, weight: tuple[int, ...]) -> bool:
        """Does dgrad read a flipped copy of a weight (o, k, k, c)?"""
        return self.tiles is None or hopper.unsupported_weight(weight) is not None

    def copy_of(self, weight: tuple[int, ...]) -> Spec | None:
        """What is kept of a weight in bfloat16 or planes of it; None where its kernels read the float32 parameter."""
        planes = 1 if self.rung == "bf16" else 0 if self.needs_flipped(weight) else PLANES[self.rung]
        return in_planes(spec(weight, ELEMENTS_OF_RUNG[self.rung]), planes) if planes else None
