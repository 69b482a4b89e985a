"""Bilinear resize, as evaluation and prediction do with logits."""

import numpy as np

from segnet_scratch.device import Device
from segnet_scratch.ops.op import ELEMENT_THREADS, Buffers, Op, Spec, element_grid, expect, expect_map


class ResizeBilinearForward(Op):
    """y (n, oh, ow, c) from x (n, h, w, c): pixel centres at half-integers, the border repeated, no antialiasing."""

    name = "resize_bilinear_forward"

    def __init__(self, x: Spec, size: tuple[int, int]) -> None:
        n, _, _, c = expect_map(self.name, "x", x)
        expect(min(size) > 0, f"resize_bilinear: size {size}; expected positive (height, width)")
        self.size = size
        self.inputs = {"x": x}
        self.outputs = {"y": x.with_shape(n, *size, c)}
        self.workspace = {}
        self.flops = 6 * self.outputs["y"].size

    def launch(self, device: Device, b: Buffers) -> None:
        grid = element_grid(b.y.size)
        self.kernel(device, "resize_bilinear_forward", grid, ELEMENT_THREADS, b.x, b.y, *b.x.shape, *self.size)

    def reference(self, b: Buffers) -> None:
        (rows, below, v), (columns, right, u) = (
            _taps(source, target, b.x.dtype) for source, target in zip(b.x.shape[1:3], self.size, strict=True)
        )
        u, v = u[:, None], v[:, None, None]
        across = b.x[:, :, columns] + u * (b.x[:, :, right] - b.x[:, :, columns])
        b.y[...] = across[:, rows] + v * (across[:, below] - across[:, rows])


def _taps(source: int, target: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, weight of the second) source index for each target index."""
    scale = dtype.type(source) / dtype.type(target)
    half = dtype.type(0.5)
    position = np.maximum((np.arange(target, dtype=dtype) + half) * scale - half, 0)
    low = np.minimum(position.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), position - low.astype(dtype)
