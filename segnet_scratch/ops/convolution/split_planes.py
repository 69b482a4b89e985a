"""float32 as the sum of bfloat16 planes: how Hopper's tensor cores, which multiply bfloat16, compute with float32."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.op import Buffers, Op, Spec, expect, spec_of
from segnet_scratch.runtime.devices import Array, Device
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
        expect(planes in (2, 3), f"{self.name}: {planes} planes; expected 2 or 3")
        self.planes = planes
        self.inputs = {"x": x}
        self.outputs = {"y": in_planes(x, planes)}

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.of(BFLOAT16)

    def reference(self, b: Buffers) -> None:
        split(b.x, b.y)


def in_planes(x: Spec, planes: int) -> Spec:
    """What the planes of an array (..., c) are; one plane is the array as it is, those of float64 have that type."""
    if planes > 1 and x.dtype == BFLOAT16:
        raise DTypeError(f"an array of shape {x.shape} has element type bfloat16; planes are those of float32")
    of = BFLOAT16 if x.dtype == np.float32 and planes > 1 else x.dtype
    return Spec((*x.shape[:-1], planes * x.shape[-1]), of)


def planes_of(read: Spec, channels: int) -> int:
    """In how many planes an op reads a map of so many channels."""
    return read.shape[-1] // channels


def split(x: np.ndarray, y: np.ndarray) -> None:
    """Fills y (..., planes c) with the planes of x (..., c)."""
    first, *others = np.split(y, y.shape[-1] // x.shape[-1], axis=-1)
    first[...], left, before = x, x, first
    with np.errstate(invalid="ignore"):  # of infinities
        for plane in others:
            held = before.astype(x.dtype)
            plane[...] = left = np.where(np.isfinite(held), left - held, 0)
            before = plane


def as_planes(x: np.ndarray, s: Spec) -> np.ndarray:
    """x in an array of this Spec: as it is, or float32 in planes."""
    y = np.empty(s.shape, s.dtype)
    split(x if x.shape == s.shape else x.astype(np.float32), y)
    return y


def joined(y: np.ndarray, planes: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """What the planes of y (..., planes c) add up to: (..., c); float32 has all 24 bits of three."""
    return np.sum(np.split(y.astype(dtype), planes, axis=-1)[::-1], axis=0)


def split_for(device: Device, array: Array, read: Spec) -> Array:
    """An array as an op reads it: as it is, or in planes."""
    if spec_of(array) == read:
        return array
    return SplitPlanes.plan(spec_of(array), planes_of(read, array.shape[-1]))(device, x=array).y


def to_planes(b: Buffers, made: str, planes: int) -> dict[str, Any]:
    """The parameters of a kernel that writes this output as it is, or in planes: the one for it or the other."""
    return {} if planes == 1 else {made: None, "in_planes": getattr(b, made)}
