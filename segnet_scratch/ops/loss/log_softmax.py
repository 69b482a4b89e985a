"""The logarithm of a softmax over the last axis."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect_array
from segnet_scratch.runtime.devices import Device


class _LogSoftmax(Op):
    """A thread goes along the last axis of the array called `over`, (..., classes)."""

    def __init__(self, s: Spec) -> None:
        self.classes = expect_array(self.name, self.over, s, "..., classes")[-1]
        self.flops = 4 * s.size

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, element_grid(getattr(b, self.over).size // self.classes))


class LogSoftmaxForward(_LogSoftmax):
    """y = x - log sum exp(x) over the last axis of x (..., classes), without overflow."""

    name, over = "log_softmax_forward", "x"

    def __init__(self, x: Spec) -> None:
        super().__init__(x)
        self.inputs, self.outputs = {"x": x}, {"y": x}

    def gradient(self) -> tuple[Op, ...]:
        return (LogSoftmaxBackward.plan(self.outputs["y"]),)

    def reference(self, b: Buffers) -> None:
        shifted = b.x - b.x.max(axis=-1, keepdims=True)
        b.y[...] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class LogSoftmaxBackward(_LogSoftmax):
    """dx = dy - exp(y) sum dy over the last axis."""

    name, over = "log_softmax_backward", "y"

    def __init__(self, y: Spec) -> None:
        super().__init__(y)
        self.inputs, self.outputs = {"y": y, "dy": y}, {"dx": y}

    def reference(self, b: Buffers) -> None:
        b.dx[...] = b.dy - np.exp(b.y) * b.dy.sum(axis=-1, keepdims=True)
