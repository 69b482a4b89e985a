"""Max-unpool by packed codes, for the fused engine (cuda/unpool_packed.cu)."""

from segnet_scratch.ops.op import Buffers, Op, Spec, expect_map
from segnet_scratch.ops.pieces import SHARE_THREADS, expect_pieces, share_grid
from segnet_scratch.ops.pooling.packed_codes import packed_codes, scatter_from, unpooled
from segnet_scratch.runtime.devices import Device


class UnpoolPacked(Op):
    """y (n, h, w, c): x (n, ceil(h/2), ceil(w/2), c) where `codes` say, 0 elsewhere; `size` is (h, w)."""

    name = "unpool_packed"

    def __init__(self, x: Spec, size: tuple[int, int]) -> None:
        *_, c = expect_map(self.name, "x", x, bfloat16=True)
        expect_pieces(self.name, x.dtype, channels=c)
        self.size = size
        self.inputs = {"x": x, "codes": packed_codes(x.shape)}
        self.outputs = {"y": unpooled(self.name, x, size)}

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, share_grid(device, b.x, resident=4), SHARE_THREADS)

    def reference(self, b: Buffers) -> None:
        b.y[...] = scatter_from(b.x, b.codes, self.size)
