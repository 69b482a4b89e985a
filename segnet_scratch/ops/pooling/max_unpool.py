"""Max-unpool 2x2: each value goes back to where its pool found it (SegNet, section 3, figure 3)."""

from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect_map
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.ops.pooling.max_pool import expect_quarters
from segnet_scratch.ops.pooling.windows import (
    CODE,
    expect_codes,
    gather_reference,
    scatter_reference,
    valid_codes,
    windows_of,
)
from segnet_scratch.runtime.devices import Device


class MaxUnpoolForward(Op):
    """y = x at the coded position of each window, 0 elsewhere. x (n, ceil(h/2), ceil(w/2), c), `size` = (h, w)."""

    name, over = "max_unpool_forward", "x"

    def __init__(self, x: Spec, codes: Spec, size: tuple[int, int]) -> None:
        n, _, _, c = expect_map(self.name, "x", x)
        expect_codes("max_unpool", codes, x.shape, size)
        self.inputs = {"x": x, "codes": Spec(x.shape, CODE)}
        self.outputs = {"y": x.with_shape(n, *size, c)}

    def gradient(self) -> tuple[Op, ...]:
        return (MaxUnpoolBackward.plan(self.outputs["y"]),)

    def reference(self, b: Buffers) -> None:
        scatter_reference(b.x, b.codes, b.y)

    def numpy(self, b: Buffers) -> None:
        pooling.scatter_windows(b.x, valid_codes(b.codes, b.y.shape[1:3]), b.y)


class MaxUnpoolPieces(MaxUnpoolForward):
    """The same, 16 bytes of float32 channels a thread: a rung that teaches and that no layer takes."""

    def __init__(self, x: Spec, codes: Spec, size: tuple[int, int]) -> None:
        super().__init__(x, codes, size)
        expect_quarters(self.name, x)

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "max_unpool_forward_pieces", b, element_grid(b.x.size // 4))


class MaxUnpoolBackward(Op):
    """dx = dy at the coded position of each window. dy (n, h, w, c)."""

    name = "max_unpool_backward"

    def __init__(self, dy: Spec) -> None:
        windows = windows_of(*expect_map(self.name, "dy", dy))
        self.inputs = {"dy": dy, "codes": Spec(windows, CODE)}
        self.outputs = {"dx": dy.with_shape(*windows)}

    def reference(self, b: Buffers) -> None:
        gather_reference(b.dy, b.codes, b.dx)

    def numpy(self, b: Buffers) -> None:
        pooling.gather_windows(b.dy, valid_codes(b.codes, b.dy.shape[1:3]), b.dx)
