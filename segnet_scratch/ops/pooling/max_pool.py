"""Max-pool 2x2 with the position of each maximum (SegNet, section 3)."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, expect_map
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.ops.pooling.windows import (
    CODE,
    WindowOp,
    expect_codes,
    scatter_reference,
    valid_codes,
    window_elements,
    windows_of,
)
from segnet_scratch.runtime.devices import Device


class MaxPoolForward(WindowOp):
    """y, codes = the maximum of each window and its position. x (n, h, w, c)."""

    name = "max_pool_forward"

    def __init__(self, x: Spec) -> None:
        windows = windows_of(*expect_map(self.name, "x", x))
        self.inputs = {"x": x}
        self.outputs = {"y": x.with_shape(*windows), "codes": Spec(windows, CODE)}
        self.flops = 3 * self.outputs["y"].size

    def gradient(self) -> tuple[Op, ...]:
        return (MaxPoolBackward.plan(self.outputs["y"], self.inputs["x"].shape[1:3]),)

    def reference(self, b: Buffers) -> None:
        b.codes[...] = 0
        b.y[...] = b.x[:, ::2, ::2]
        for code, elements in window_elements(b.x)[1:]:
            candidate = b.x[elements]
            rows, columns = candidate.shape[1:3]
            best, codes = b.y[:, :rows, :columns], b.codes[:, :rows, :columns]
            wins = (candidate > best) | (np.isnan(candidate) & ~np.isnan(best))
            codes[wins] = code
            best[wins] = candidate[wins]

    def numpy(self, b: Buffers) -> None:
        pooling.max_pool_forward(b.x, b.y, b.codes)


class MaxPoolScalar(MaxPoolForward):
    """The same, a thread a channel whatever the map: a rung that teaches."""

    pieces = False


class MaxPoolBackward(WindowOp):
    """dx = dy at the position of each maximum, 0 elsewhere. `size` is the (h, w) of x."""

    name, over = "max_pool_backward", "dy"

    def __init__(self, dy: Spec, size: tuple[int, int]) -> None:
        n, _, _, c = expect_map(self.name, "dy", dy)
        expect_codes(self.name, Spec(dy.shape, CODE), dy.shape, size)
        self.inputs = {"dy": dy, "codes": Spec(dy.shape, CODE)}
        self.outputs = {"dx": dy.with_shape(n, *size, c)}

    def launch(self, device: Device, b: Buffers) -> None:
        self.over_windows(device, b, "max_unpool_forward_pieces", x=b.dy, y=b.dx)

    def reference(self, b: Buffers) -> None:
        scatter_reference(b.dy, b.codes, b.dx)

    def numpy(self, b: Buffers) -> None:
        pooling.scatter_windows(b.dy, valid_codes(b.codes, b.dx.shape[1:3]), b.dx)
