"""One step of SGD with momentum over all parameters of a model, in one launch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.op import Buffers
from segnet_scratch.ops.optimiser.array_table import CHUNK, NUMBER, ArraysOp
from segnet_scratch.runtime.workers import parallel_for


class SgdStep(ArraysOp):
    """m = momentum m + scale g + decay w; w = w - rate lr m, in place: w a parameter, g its gradient, m its momentum.

    `rates` and `decays` are one number per parameter. lr and scale, which multiplies all gradients, are float64 (1).
    Where scale is NaN, nothing moves.
    """

    name = "sgd_step"
    kinds = ("parameter", "gradient", "momentum")

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        rates: Sequence[float],
        decays: Sequence[float],
        momentum: float,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(shapes, dtype)
        self.rates, self.decays, self.momentum = rates, decays, float(momentum)
        self.updates = tuple(name for name in self.inputs if not name.startswith("gradient"))
        self.inputs |= {"lr": NUMBER, "scale": NUMBER}
        self.tables |= {"rates": np.array(rates, np.float64), "decays": np.array(decays, np.float64)}
        self.flops = 7 * sum(self.sizes)

    def reference(self, b: Buffers) -> None:
        if np.isnan(b.scale[0]):
            return
        arrays = (self.of(b, kind) for kind in SgdStep.kinds)
        for w, g, m, rate, decay in zip(*arrays, self.rates, self.decays, strict=True):
            m[...] = self.momentum * m + b.scale[0] * g + decay * w
            w[...] = w - rate * b.lr[0] * m

    def numpy(self, b: Buffers) -> None:
        """In pieces that stay in a cache."""
        if np.isnan(b.scale[0]):
            return
        lr, scale = float(b.lr[0]), float(b.scale[0])
        arrays = [[array.reshape(-1) for array in self.of(b, kind)] for kind in SgdStep.kinds]

        def update(index: int) -> None:
            (w, g, m), rate, decay = (of[index] for of in arrays), self.rates[index] * lr, self.decays[index]
            for start in range(0, w.size, CHUNK):
                piece = slice(start, start + CHUNK)
                scaled = g[piece] if scale == 1 else scale * g[piece]
                m[piece] = self.momentum * m[piece] + (scaled + decay * w[piece])
                w[piece] -= rate * m[piece]

        parallel_for(len(self.sizes), update)


class KeepFinite(ArraysOp):
    """Arrays that a step writes before it is known whether its gradients are finite, and a copy of each, `kept`.

    Where they are, the copies become the arrays; where not, which a scale (1), float64, of NaN says, the arrays become
    the copies.
    """

    name = "keep_finite"
    kinds = ("array", "kept")

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike = np.float32) -> None:
        super().__init__(shapes, dtype)
        self.updates = tuple(self.inputs)
        self.inputs |= {"scale": NUMBER}

    def reference(self, b: Buffers) -> None:
        for array, kept in zip(self.of(b, "array"), self.of(b, "kept"), strict=True):
            target, source = (array, kept) if np.isnan(b.scale[0]) else (kept, array)
            target[...] = source
