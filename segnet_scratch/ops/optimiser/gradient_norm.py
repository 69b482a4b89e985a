"""The Euclidean length of all gradients of a model together, and the factor that clips it, left on the device."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.op import Buffers, expect, spec
from segnet_scratch.ops.optimiser.array_table import CHUNK, NUMBER, ArraysOp
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.workers import parallel_for


class GradientNorm(ArraysOp):
    """norm = sqrt(sum of squares of every gradient); scale = min(1, largest / norm) (Pascanu et al., arXiv 1211.5063).

    One element that is not finite makes the norm not finite, and from then on the scale is NaN, whatever follows: the
    update that takes it (sgd.py) moves nothing until somebody writes 1 there. Every sum is carried in double, in an
    order that depends on the shapes alone. All float64: squares (parameters), the sum of each gradient's squares; norm
    (1); scale (1), in place.
    """

    name = "gradient_norm"
    kinds = ("gradient",)
    updates = ("scale",)
    MERGE_THREADS = 1024

    def __init__(self, shapes: Sequence[tuple[int, ...]], largest: float, dtype: DTypeLike = np.float32) -> None:
        super().__init__(shapes, dtype)
        expect(largest > 0, f"{self.name}: the largest norm is {largest}; expected a positive number, or infinity")
        self.largest = float(largest)
        self.inputs |= {"scale": NUMBER}
        self.outputs = {"squares": spec((len(shapes),), np.float64), "norm": NUMBER}
        self.workspace = {"partials": spec((self.chunks,), np.float64)}
        self.flops = 2 * sum(self.sizes)
        # Where the chunks of each parameter begin, and the end of the last one.
        bounds = np.searchsorted(self.tables["chunk_parameter"], np.arange(len(shapes) + 1))
        self.tables["first_chunk"] = bounds.astype(np.int32)

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "gradient_norm_partial", b, self.chunks)
        self.kernel(device, "gradient_norm_merge", b, 1, self.MERGE_THREADS)

    def reference(self, b: Buffers) -> None:
        b.squares[...] = [(g.astype(np.float64) ** 2).sum() for g in self.of(b, "gradient")]
        b.norm[...] = np.sqrt(b.squares.sum())
        b.scale[...] = min(1, self.largest / b.norm[0]) if b.norm[0] > 0 else 1

    def numpy(self, b: Buffers) -> None:
        gradients = [g.reshape(-1) for g in self.of(b, "gradient")]

        def add_up(index: int) -> None:
            total = 0.0
            for start in range(0, gradients[index].size, CHUNK):
                piece = gradients[index][start : start + CHUNK].astype(np.float64)
                total += float(piece @ piece)
            b.squares[index] = total

        parallel_for(len(gradients), add_up)
        b.norm[0] = norm = np.sqrt(b.squares.sum())
        if not np.isnan(b.scale[0]):
            clipped = self.largest / norm if norm > self.largest else 1
            b.scale[0] = clipped if np.isfinite(norm) else np.nan
