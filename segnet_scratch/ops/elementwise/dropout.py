"""Dropout whose mask is a function of (seed, step, layer, sample, element) alone, equal on all devices."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect, expect_array
from segnet_scratch.runtime.devices import Device

STATE = Spec((2,), np.dtype(np.uint64))  # seed, step


class DropoutForward(Op):
    """y = x / (1 - p) where the random number is at least p, else 0. x (n, ...); the mask differs for each of the n."""

    name = "dropout_forward"

    def __init__(self, x: Spec, p: float, layer: int) -> None:
        expect_array(self.name, "x", x)
        expect(len(x.shape) >= 2, f"dropout: x has shape {x.shape}; expected (n, ...)")
        expect(0 <= p < 1, f"dropout: p is {p}; expected 0 <= p < 1")
        self.p, self.layer = p, layer
        self.per_sample = x.size // x.shape[0]
        self.inputs = {"x": x, "state": STATE}
        self.outputs = {"y": x}
        self.flops = 2 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        n = b.x.shape[0]
        self.kernel(device, self.name, b, (element_grid(-(-self.per_sample // 4)), n), n=n)

    def reference(self, b: Buffers) -> None:
        seed, step = int(b.state[0]), int(b.state[1])
        groups = np.arange(-(-self.per_sample // 4), dtype=np.uint64)
        for sample in range(len(b.x)):
            words = philox(groups, sample, self.layer, step, seed)
            # As the kernel compares: the probability in the element type of x, the product in double.
            kept = words[: self.per_sample] >= float(b.x.dtype.type(self.p)) * 2.0**32
            scale = b.x.dtype.type(1) / (b.x.dtype.type(1) - b.x.dtype.type(self.p))
            b.y[sample] = np.where(kept.reshape(b.x.shape[1:]), b.x[sample] * scale, 0)


def philox(groups: np.ndarray, sample: int, layer: int, step: int, seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011): four numbers below 2^32 for each of the `groups`, one after the other."""
    low32 = 0xFFFFFFFF
    mask = np.uint64(low32)
    c0 = groups & mask
    c1, c2, c3 = (np.full_like(groups, word & low32) for word in (sample, layer, step))
    key0, key1 = seed & low32, seed >> 32 & low32
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        high0, high1 = product0 >> np.uint64(32), product1 >> np.uint64(32)
        c0, c1, c2, c3 = (high1 ^ c1 ^ np.uint64(key0), product1 & mask, high0 ^ c3 ^ np.uint64(key1), product0 & mask)
        key0, key1 = key0 + 0x9E3779B9 & low32, key1 + 0xBB67AE85 & low32
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)
