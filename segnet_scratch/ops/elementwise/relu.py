"""Rectified linear unit."""

import numpy as np

from segnet_scratch.ops.elementwise import fast as activation
from segnet_scratch.ops.op import Buffers, Op, Spec, expect_array


class ReluForward(Op):
    """y = max(x, 0); a NaN stays a NaN."""

    name, each = "relu_forward", 4

    def __init__(self, x: Spec) -> None:
        expect_array(self.name, "x", x)
        self.inputs = {"x": x}
        self.outputs = {"y": x}
        self.flops = x.size

    def gradient(self) -> tuple[Op, ...]:
        return (ReluBackward.plan(self.outputs["y"]),)

    def reference(self, b: Buffers) -> None:
        b.y[...] = np.where(b.x <= 0, 0, b.x)

    def numpy(self, b: Buffers) -> None:
        activation.relu_forward(b.x, b.y)


class ReluBackward(Op):
    """dx = dy where y > 0, else 0."""

    name, each = "relu_backward", 4

    def __init__(self, y: Spec) -> None:
        expect_array(self.name, "y", y)
        self.inputs = {"y": y, "dy": y}
        self.outputs = {"dx": y}
        self.flops = y.size

    def reference(self, b: Buffers) -> None:
        b.dx[...] = np.where(b.y > 0, b.dy, 0)

    def numpy(self, b: Buffers) -> None:
        activation.relu_backward(b.y, b.dy, b.dx)
