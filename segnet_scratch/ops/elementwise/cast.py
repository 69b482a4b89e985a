"""float32 to bfloat16 and back, element by element."""

import numpy as np

from segnet_scratch.ops.op import Buffers, Op, Spec, expect, expect_type
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.precision import BFLOAT16


class Cast(Op):
    """y = x in the other type: float32 becomes bfloat16, to nearest with ties to even, bfloat16 becomes float32."""

    name, each = "cast", 8

    def __init__(self, x: Spec) -> None:
        expect_type(self.name, "x", x.dtype, np.float32, BFLOAT16)
        expect(x.size > 0, f"{self.name}: x is empty: shape {x.shape}")
        self.inputs = {"x": x}
        self.outputs = {"y": Spec(x.shape, np.dtype(np.float32) if x.dtype == BFLOAT16 else BFLOAT16)}

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.of(BFLOAT16)

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "cast_from_bfloat16" if b.x.dtype == BFLOAT16 else "cast_to_bfloat16", b)

    def reference(self, b: Buffers) -> None:
        b.y[...] = b.x
