"""The class of every pixel."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, expect, expect_array


class ArgmaxForward(Op):
    """labels uint8 (...) from logits (..., classes): the first largest, the first NaN before any number."""

    name = "argmax_forward"

    def __init__(self, logits: Spec) -> None:
        expect_array(self.name, "logits", logits)
        expect(len(logits.shape) >= 2, f"argmax: logits {logits.shape}; expected (..., classes)")
        self.classes = logits.shape[-1]
        expect(self.classes <= 256, f"argmax: {self.classes} classes; at most 256 fit a uint8 label")
        self.inputs = {"logits": logits}
        self.outputs = {"labels": Spec(logits.shape[:-1], np.dtype(np.uint8))}
        self.flops = logits.size

    def reference(self, b: Buffers) -> None:
        b.labels[...] = np.argmax(b.logits, axis=-1)
