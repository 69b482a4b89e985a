"""Max-pool 2x2 with the position of each maximum (SegNet, section 3)."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect, expect_map
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.ops.pooling.windows import (
    CODE,
    expect_codes,
    scatter_reference,
    valid_codes,
    window_elements,
    windows_of,
)
from segnet_scratch.runtime.devices import Device


class MaxPoolForward(Op):
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


class MaxPoolPieces(MaxPoolForward):
    """The same, 16 bytes of float32 channels a thread: a rung that teaches and that no layer takes."""

    def __init__(self, x: Spec) -> None:
        super().__init__(x)
        expect_quarters(self.name, x)

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "max_pool_forward_pieces", b, element_grid(b.y.size // 4))


def expect_quarters(op: str, x: Spec) -> None:
    """ShapeError unless the channels of x come in fours: what the rung "pieces" moves at once."""
    expect(x.shape[3] % 4 == 0, f"{op}: rung 'pieces' takes channels in multiples of 4, not {x.shape[3]}")


class MaxPoolBackward(Op):
    """dx = dy at the position of each maximum, 0 elsewhere. `size` is the (h, w) of x."""

    name, over = "max_pool_backward", "dy"

    def __init__(self, dy: Spec, size: tuple[int, int]) -> None:
        n, _, _, c = expect_map(self.name, "dy", dy)
        expect_codes(self.name, Spec(dy.shape, CODE), dy.shape, size)
        self.inputs = {"dy": dy, "codes": Spec(dy.shape, CODE)}
        self.outputs = {"dx": dy.with_shape(n, *size, c)}

    def reference(self, b: Buffers) -> None:
        scatter_reference(b.dy, b.codes, b.dx)

    def numpy(self, b: Buffers) -> None:
        pooling.scatter_windows(b.dy, valid_codes(b.codes, b.dx.shape[1:3]), b.dx)
