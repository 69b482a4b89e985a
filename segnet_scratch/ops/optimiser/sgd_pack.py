"""SGD that also writes the weights as the fused engine's kernels read them, all parameters in one launch."""

from collections.abc import Callable, Sequence
from math import gcd, prod

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.convolution.split_planes import split
from segnet_scratch.ops.op import Buffers, Spec, expect
from segnet_scratch.ops.optimiser.sgd import SgdStep
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.precision import BFLOAT16

TILE, ROWS = 32, 8  # of cuda/sgd_pack.cu
Shapes = Sequence[tuple[int, ...] | None]


class SgdPackStep(SgdStep):
    """SgdStep of float32 parameters; beside each weight (o, k, k, c) it keeps a copy and a flipped one up to date.

    `copies` (padded, k, k, planes c) and `flipped` (c, k, k, padded) are shapes, None for a parameter that has none. A
    copy is in `planes` of bfloat16 (split_planes.py; one is the weight, rounded), flipped ones have the element type
    `storage`, float32 or bfloat16 (both float64 with parameters of float64, for the reference alone).
    padded is at least o, and what lies beyond o is left alone. flipped[c, k-1-y, k-1-x, o] is weight[o, y, x, c].
    Without `update` nothing moves, and the copies are written of the parameters as they are.
    """

    name = "sgd_pack_step"
    beside = ("copy", "flipped")

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        rates: Sequence[float],
        decays: Sequence[float],
        momentum: float,
        copies: Shapes,
        flipped: Shapes,
        storage: DTypeLike,
        planes: int = 1,
        update: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(shapes, rates, decays, momentum, dtype)
        of_parameters, self.storage = np.dtype(dtype), np.dtype(storage)
        self.planes, self.update = planes, update
        if not of_parameters == self.storage == np.float64:
            if of_parameters != np.float32:
                raise DTypeError(f"{self.name}: parameters have element type {of_parameters}; expected float32")
            if self.storage not in (np.float32, BFLOAT16):
                raise DTypeError(f"{self.name}: copies of element type {self.storage}; expected float32 or bfloat16")
        for kind, given in (("copy", copies), ("flipped", flipped)):
            expect(len(given) == len(shapes), f"{self.name}: {len(given)} of {kind} for {len(shapes)} parameters")
        if not update:
            self.inputs = {name: s for name, s in self.inputs.items() if not name.startswith(("gradient", "momentum"))}
        padded = [self._padded(*of_parameter) for of_parameter in enumerate(zip(shapes, copies, flipped, strict=True))]
        self.updates = tuple(name for name in self.inputs if name.startswith(("parameter", "momentum", *self.beside)))
        seen = [(*_as_weight(shape), outputs) for shape, outputs in zip(shapes, padded, strict=True)]
        tiles = [
            (index, output, tap, channel)
            for index, (outputs, taps, channels, _) in enumerate(seen)
            for tap in range(taps)
            for output in range(0, outputs, TILE)
            for channel in range(0, channels, TILE)
        ]
        self.tables |= {"shapes": np.array(seen, np.int32), "tiles": np.array(tiles, np.int32)}

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.of(self.storage)

    def _padded(self, index: int, shapes: Shapes) -> int:
        """Outputs of the copies of a parameter, checked, and theirs among the inputs; 0 where it has none."""
        shape, copy, flipped = shapes
        given = copy or (flipped and flipped[::-1])
        of_copies = np.dtype(np.float64) if self.storage == np.float64 else BFLOAT16
        if not shape or not given:
            return 0
        what = f"{self.name}: parameter {index} has shape {shape}"
        expect(len(shape) == 4, f"{what}; only a weight (o, k, k, c) has copies")
        o, *kernel, c = shape
        padded = max(o, given[0])
        kinds = {
            "copy": (copy, Spec((padded, *kernel, self.planes * c), of_copies)),
            "flipped": (flipped, Spec((c, *kernel, padded), self.storage)),
        }
        for kind, (found, expected) in kinds.items():
            if found is not None:
                what = f"{self.name}: {kind} {index} has shape {found}"
                expect(found == expected.shape, f"{what}; expected {expected.shape} for a weight {shape}")
                self.inputs[f"{kind}{index}"] = expected
        return padded

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, len(self.tables["tiles"]), (TILE, ROWS), tile_count=len(self.tables["tiles"]))

    def reference(self, b: Buffers) -> None:
        self._compute(b, super().reference)

    def numpy(self, b: Buffers) -> None:
        self._compute(b, super().numpy)

    def _compute(self, b: Buffers, step: Callable[[Buffers], None]) -> None:
        if self.update:
            step(b)
            if np.isnan(b.scale[0]):
                return
        for w, copy, flipped in zip(*(self.of(b, kind) for kind in ("parameter", *self.beside)), strict=True):
            if copy is not None:
                split(w, copy[: len(w)])
            if flipped is not None:
                flipped[..., : len(w)] = w[:, ::-1, ::-1].transpose(3, 1, 2, 0)


def _as_weight(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(outputs, taps, channels) of a parameter; a vector in tiles as full as its length allows."""
    if len(shape) == 4:
        return shape[0], shape[1] * shape[2], shape[3]
    size = prod(shape)
    channels = gcd(size, TILE)
    return size // channels, 1, channels
