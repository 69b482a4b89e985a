"""float32 as the sum of bfloat16 planes: how Hopper's tensor cores, which multiply bfloat16, compute with float32."""

import numpy as np

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.op import Buffers, Op, Spec, expect
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.precision import BFLOAT16

PLANES = {"bf16": 1, "tf32": 2, "tf32x3": 3}
"""Of a factor, by the rung that is asked for: as exact as it, or more."""


class SplitPlanes(Op):
    """y (..., planes c) of x (..., c), float32: plane k is what those before it leave of x, rounded to bfloat16.

    Two planes are x but for 2^-16 of it, three are x. Of an infinity or a NaN the first plane alone is not 0.
    """

    name, over, each = "split_planes", "x", 4

    def __init__(self, x: Spec, planes: int) -> None:
        if x.dtype != np.float32:
            raise DTypeError(f"{self.name}: x has element type {x.dtype}; expected float32")
        expect(x.size > 0, f"{self.name}: x is empty: shape {x.shape}")
        expect(x.shape[-1] % 4 == 0, f"{self.name}: {x.shape[-1]} channels; expected a multiple of 4")
        expect(1 <= planes <= 3, f"{self.name}: {planes} planes; expected 1 to 3")
        self.planes = planes
        self.inputs = {"x": x}
        self.outputs = {"y": Spec((*x.shape[:-1], planes * x.shape[-1]), BFLOAT16)}

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.of(BFLOAT16)

    def reference(self, b: Buffers) -> None:
        left = b.x.copy()
        with np.errstate(invalid="ignore"):  # of infinities
            for plane in np.split(b.y, self.planes, axis=-1):
                plane[...] = left
                left = np.where(np.isfinite(plane.astype(np.float32)), left - plane.astype(np.float32), 0)
