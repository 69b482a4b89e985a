"""Confusion matrix of predicted and true labels."""

import numpy as np

from segnet_scratch.ops.op import ELEMENT_THREADS, Buffers, Op, Spec, element_grid, expect
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes

LABELS = np.dtype(np.uint8)


class ConfusionAccumulate(Op):
    """counts[truth, prediction] += 1 for every pixel of a class; void (255) is none. In place.

    truth, prediction uint8 (pixels), counts uint64 (classes, classes).
    """

    name = "confusion_accumulate"
    updates = ("counts",)

    def __init__(self, pixels: int, classes: int) -> None:
        expect(
            pixels > 0 and 0 < classes <= 255,
            f"confusion: {pixels} pixels, {classes} classes; expected 1 to 255",
        )
        self.pixels, self.classes = pixels, classes
        labels = Spec((pixels,), LABELS)
        counts = Spec((classes, classes), np.dtype(np.uint64))
        self.inputs = {"truth": labels, "prediction": labels, "counts": counts}
        self.outputs = {}
        self.workspace = {}
        self.flops = 0

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.of(np.dtype(np.float32))  # the kernel holds no floating-point numbers

    def launch(self, device: Device, b: Buffers) -> None:
        arguments = (b.truth, b.prediction, b.counts, self.pixels, self.classes)
        self.kernel(device, "confusion_accumulate", element_grid(self.pixels), ELEMENT_THREADS, *arguments)

    def reference(self, b: Buffers) -> None:
        counted = (b.truth < self.classes) & (b.prediction < self.classes)
        pairs = b.truth[counted].astype(np.int64) * self.classes + b.prediction[counted]
        b.counts += np.bincount(pairs, minlength=self.classes**2).reshape(b.counts.shape).astype(np.uint64)
