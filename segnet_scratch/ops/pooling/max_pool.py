"""Max-pool 2x2 with the position of each maximum (SegNet, section 3)."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, expect_map
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.ops.pooling.max_unpool import ToPositions
from segnet_scratch.ops.pooling.windows import CODE, WindowOp, window_elements, windows_of
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
    """The same, one thread per channel whatever the map: a rung that teaches."""

    pieces = False


class MaxPoolBackward(ToPositions):
    """dx = dy at the position of each maximum, 0 elsewhere. `size` is the (h, w) of x."""

    name, over, made = "max_pool_backward", "dy", "dx"

    def __init__(self, dy: Spec, size: tuple[int, int]) -> None:
        super().__init__(dy, Spec(dy.shape, CODE), size)

    def launch(self, device: Device, b: Buffers) -> None:
        self.over_windows(device, b, "max_unpool_forward_pieces", x=b.dy, y=b.dx)
