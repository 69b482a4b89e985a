"""The logarithm of a softmax over the last axis."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect, expect_float
from segnet_scratch.runtime.devices import Device


class LogSoftmaxForward(Op):
    """y = x - log sum exp(x) over the last axis of x (..., classes), without overflow."""

    name = "log_softmax_forward"

    def __init__(self, x: Spec) -> None:
        _check(self.name, "x", x)
        self.inputs = {"x": x}
        self.outputs = {"y": x}
        self.workspace = {}
        self.flops = 4 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, element_grid(b.x.size // b.x.shape[-1]))

    def gradient(self) -> tuple[Op, ...]:
        return (LogSoftmaxBackward.plan(self.outputs["y"]),)

    def reference(self, b: Buffers) -> None:
        shifted = b.x - b.x.max(axis=-1, keepdims=True)
        b.y[...] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class LogSoftmaxBackward(Op):
    """dx = dy - exp(y) sum dy over the last axis."""

    name = "log_softmax_backward"

    def __init__(self, y: Spec) -> None:
        _check(self.name, "y", y)
        self.inputs = {"y": y, "dy": y}
        self.outputs = {"dx": y}
        self.workspace = {}
        self.flops = 4 * y.size

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, element_grid(b.y.size // b.y.shape[-1]))

    def reference(self, b: Buffers) -> None:
        b.dx[...] = b.dy - np.exp(b.y) * b.dy.sum(axis=-1, keepdims=True)


def _check(op: str, name: str, s: Spec) -> None:
    expect_float(op, name, s)
    expect(len(s.shape) > 0 and s.size > 0, f"{op}: {name} {s.shape}; expected (..., classes), no side of it empty")
