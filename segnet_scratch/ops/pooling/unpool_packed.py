"""Max-unpool by packed codes, for the fused engine (cuda/unpool_packed.cu)."""

from segnet_scratch.ops.convolution.split_planes import in_planes, split, to_planes
from segnet_scratch.ops.op import Buffers, Op, Spec, expect_map
from segnet_scratch.ops.pieces import SHARE_THREADS, expect_pieces, share_grid
from segnet_scratch.ops.pooling.packed_codes import packed_codes, scatter_from, unpooled
from segnet_scratch.runtime.devices import Device


class UnpoolPacked(Op):
    """y (n, h, w, c): x (n, ceil(h/2), ceil(w/2), c) where `codes` say, 0 elsewhere; `size` is (h, w).

    Of float32, y may be in `planes` of bfloat16 (split_planes.py).
    """

    name = "unpool_packed"

    def __init__(self, x: Spec, size: tuple[int, int], planes: int = 1) -> None:
        *_, c = expect_map(self.name, "x", x, bfloat16=True)
        expect_pieces(self.name, x.dtype, channels=c)
        self.size, self.planes = size, planes
        self.inputs = {"x": x, "codes": packed_codes(x.shape)}
        self.outputs = {"y": in_planes(unpooled(self.name, x, size), planes)}

    def launch(self, device: Device, b: Buffers) -> None:
        grid = share_grid(device, b.x, resident=4)
        self.kernel(device, self.name, b, grid, SHARE_THREADS, **to_planes(b, "y", self.planes))

    def reference(self, b: Buffers) -> None:
        split(scatter_from(b.x, b.codes, self.size), b.y)
