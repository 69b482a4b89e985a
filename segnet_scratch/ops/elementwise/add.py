"""Sum of two arrays: where a tensor is used more than once, its gradients are added."""

from segnet_scratch.ops.op import ELEMENT_THREADS, Buffers, Op, Spec, element_grid, expect_elements
from segnet_scratch.runtime.devices import Device


class AddForward(Op):
    """y = a + b, both of one shape."""

    name = "add_forward"

    def __init__(self, a: Spec) -> None:
        expect_elements(self.name, "a", a)
        self.inputs = {"a": a, "b": a}
        self.outputs = {"y": a}
        self.flops = a.size

    def launch(self, device: Device, b: Buffers) -> None:
        count = b.y.size
        self.kernel(device, "add_forward", element_grid(count), ELEMENT_THREADS, b.a, b.b, b.y, count)

    def reference(self, b: Buffers) -> None:
        b.y[...] = b.a + b.b
