"""Softmax cross-entropy of the fused engine: loss and gradient at once, of padded logits."""

import numpy as np

from segnet_scratch.ops.loss.cross_entropy import CrossEntropyBackward, CrossEntropyForward, expect_objective
from segnet_scratch.ops.op import VOID, Buffers, Op, Spec, element_grid, expect, expect_map, spec_of
from segnet_scratch.ops.pieces import expect_pieces
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes

DOUBLE = np.dtype(np.float64)


class SoftmaxCrossEntropy(Op):
    """loss (1) and dlogits of logits (n, h, w, padded), of which the first `classes` count; dlogits of the rest is 0.

    labels uint8 (n, h, w), 255 is void; class_weights (classes) or None; share float64 (1), by which loss and gradient
    are multiplied, or None. `normalisation` and `smoothing` as in CrossEntropyForward.
    """

    name = "softmax_cross_entropy"
    optional = ("class_weights", "share")
    MAX_BLOCKS = 1024

    def __init__(self, logits: Spec, classes: int, normalisation: str = "weights", smoothing: float = 0.0) -> None:
        n, h, w, padded = expect_map(self.name, "logits", logits, bfloat16=True)
        expect_pieces(self.name, logits.dtype, logits=padded)
        most = min(padded, VOID)
        expect(1 <= classes <= most, f"{self.name}: {classes} classes in {padded} channels; expected 1 to {most}")
        expect_objective(normalisation, smoothing)
        self.pixels, self.classes, self.padded = n * h * w, classes, padded
        self.normalisation, self.smoothing = normalisation, smoothing
        self.blocks = min(element_grid(self.pixels), self.MAX_BLOCKS)
        self.vector = ElementTypes.of(logits.dtype).accumulate
        labels, weights = Spec((n, h, w), np.dtype(np.uint8)), Spec((classes,), self.vector)
        self.inputs = {"logits": logits, "labels": labels, "class_weights": weights, "share": Spec((1,), DOUBLE)}
        self.outputs = {"loss": Spec((1,), self.vector), "dlogits": logits}
        sums = {"counts": (self.blocks, 2), "reciprocal": (1,), "partials": (self.blocks, 1)}
        self.workspace = {name: Spec(shape, DOUBLE) for name, shape in sums.items()}
        self.flops = 10 * self.pixels * classes

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, f"{self.name}_count", b, self.blocks, partials=b.counts)
        by_valid = int(self.normalisation == "valid")
        self.kernel(device, f"{self.name}_normalise", b, 1, partials=b.counts, by_valid=by_valid)
        self.kernel(device, self.name, b, self.blocks)
        self.kernel(device, f"{self.name}_merge", b, 1)

    def reference(self, b: Buffers) -> None:
        logits = b.logits[..., : self.classes]
        given = {"logits": logits, "labels": b.labels, "class_weights": b.class_weights}
        sums, gradient = np.empty(3), np.empty_like(logits)
        options = self.normalisation, self.smoothing
        CrossEntropyForward.plan(spec_of(logits), *options).reference(Buffers(**given, loss=b.loss, sums=sums))
        share = np.ones(1, logits.dtype) if b.share is None else b.share.astype(logits.dtype)
        b.loss *= share
        backward = CrossEntropyBackward.plan(spec_of(logits), *options)
        backward.reference(Buffers(**given, sums=sums, dloss=share, dlogits=gradient))
        b.dlogits[...] = 0
        b.dlogits[..., : self.classes] = gradient
