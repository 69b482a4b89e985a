"""Max-unpool 2x2: each value goes back to where its pool found it (SegNet, section 3, figure 3)."""

from typing import Any, ClassVar

from segnet_scratch.ops.op import Buffers, Op, Spec, expect, expect_map
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.ops.pooling.windows import CODE, WindowOp, gather, scatter, valid_codes, windows_of


class ToPositions(WindowOp):
    """The map `made` of values `over`: each at the coded position of its window, 0 elsewhere."""

    made: ClassVar[str]

    def __init__(self, values: Spec, codes: Spec, size: tuple[int, int]) -> None:
        n, _, _, c = expect_map(self.name, self.over, values)
        op = self.name.removesuffix("_forward")
        what = f"{op}: codes {codes.shape} of a map of size {size} do not fit values {values.shape}"
        fits = codes.shape == values.shape == windows_of(n, *size, c)
        expect(fits, f"{what}; pass the codes of the pool that made them")
        self.inputs = {self.over: values, "codes": codes}
        self.outputs = {self.made: values.with_shape(n, *size, c)}

    def reference(self, b: Buffers) -> None:
        scatter(*self._moved(b))

    def numpy(self, b: Buffers) -> None:
        pooling.scatter_windows(*self._moved(b))

    def _moved(self, b: Buffers) -> tuple[Any, ...]:
        out = getattr(b, self.made)
        return getattr(b, self.over), valid_codes(b.codes, out.shape[1:3]), out


class MaxUnpoolForward(ToPositions):
    """y = x at the coded position of each window, 0 elsewhere. x (n, ceil(h/2), ceil(w/2), c), `size` = (h, w)."""

    name, over, made = "max_unpool_forward", "x", "y"

    def gradient(self) -> tuple[Op, ...]:
        return (MaxUnpoolBackward.plan(self.outputs["y"]),)


class MaxUnpoolScalar(MaxUnpoolForward):
    """The same, one thread per channel whatever the map: a rung that teaches."""

    pieces = False


class MaxUnpoolBackward(WindowOp):
    """dx = dy at the coded position of each window. dy (n, h, w, c)."""

    name = "max_unpool_backward"

    def __init__(self, dy: Spec) -> None:
        windows = windows_of(*expect_map(self.name, "dy", dy))
        self.inputs = {"dy": dy, "codes": Spec(windows, CODE)}
        self.outputs = {"dx": dy.with_shape(*windows)}

    def reference(self, b: Buffers) -> None:
        gather(b.dy, valid_codes(b.codes, b.dy.shape[1:3]), b.dx)

    def numpy(self, b: Buffers) -> None:
        pooling.gather_windows(b.dy, valid_codes(b.codes, b.dy.shape[1:3]), b.dx)
