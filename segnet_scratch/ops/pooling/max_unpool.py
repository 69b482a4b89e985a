"""Max-unpool 2x2: each value goes back to where its pool found it (SegNet, section 3, figure 3)."""

from segnet_scratch.ops.op import Buffers, Op, Spec, expect_map
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.ops.pooling.windows import (
    CODE,
    WindowOp,
    expect_codes,
    gather_reference,
    scatter_reference,
    valid_codes,
    windows_of,
)


class MaxUnpoolForward(WindowOp):
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


class MaxUnpoolScalar(MaxUnpoolForward):
    """The same, a thread a channel whatever the map: a rung that teaches."""

    pieces = False


class MaxUnpoolBackward(WindowOp):
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
