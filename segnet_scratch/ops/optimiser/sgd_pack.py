"""SGD that also writes the weights as the fused engine's kernels read them, all parameters in one launch."""

from collections.abc import Sequence
from math import gcd, prod

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.optimiser.array_table import ArrayTable
from segnet_scratch.ops.optimiser.sgd import SgdStep
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.launch import ElementTypes, launch
from segnet_scratch.runtime.precision import BFLOAT16

TILE, ROWS = 32, 8  # of cuda/sgd_pack.cu


class SgdPackStep(SgdStep):
    """SgdStep of float32 parameters; beside each weight (o, k, k, c) it keeps a copy and a flipped one up to date.

    `copies` (padded, k, k, c) and `flipped` (c, k, k, padded) have the element type `storage`, float32 or bfloat16, and
    None for a parameter that has none; padded is at least o, and what lies beyond o is left alone.
    flipped[c, k-1-y, k-1-x, o] is weight[o, y, x, c].
    """

    name = "sgd_pack_step"

    def __init__(
        self,
        device: Device,
        parameters: Sequence[Array],
        momenta: Sequence[Array],
        rates: Sequence[float],
        decays: Sequence[float],
        momentum: float,
        copies: Sequence[Array | None],
        flipped: Sequence[Array | None],
        storage: np.dtype,
    ) -> None:
        super().__init__(device, parameters, momenta, rates, decays, momentum)
        if self.table.dtype != np.float32:
            raise DTypeError(f"{self.name}: parameters have element type {self.table.dtype}; expected float32")
        if storage not in (np.float32, BFLOAT16):
            raise DTypeError(f"{self.name}: copies of element type {storage}; expected float32 or bfloat16")
        self.storage = np.dtype(storage)
        self.copies, self.flipped = list(copies), list(flipped)
        for kind, arrays in (("copy", self.copies), ("flipped", self.flipped)):
            if len(arrays) != len(self.parameters):
                raise ShapeError(f"{self.name}: {len(arrays)} arrays of {kind} for {len(self.parameters)} parameters")
        padded = [self._padded(index, shape) for index, shape in enumerate(self.table.shapes)]
        self._shapes = [(*_as_weight(s), p) for s, p in zip(self.table.shapes, padded, strict=True)]
        self._tiles = [
            (index, output, tap, channel)
            for index, (outputs, taps, channels, _) in enumerate(self._shapes)
            for tap in range(taps)
            for output in range(0, outputs, TILE)
            for channel in range(0, channels, TILE)
        ]
        self._on_device: tuple[Array, ...] = ()
        self._zero = device.zeros((1,), np.float64)
        # Apart from that of the steps: a graph has its address, and no other columns may take its place.
        self._table_of_refresh = ArrayTable(device, self.name, self.parameters)

    def _padded(self, index: int, shape: tuple[int, ...]) -> int:
        """Outputs of the copies of a parameter, checked; 0 where it has none."""
        copy, flipped = self.copies[index], self.flipped[index]
        if copy is None and flipped is None:
            return 0
        if len(shape) != 4:
            raise ShapeError(f"{self.name}: parameter {index} has shape {shape}; only a weight (o, k, k, c) has copies")
        given = [
            array.shape[axis] for array, axis in ((copy, 0), (flipped, -1)) if array is not None and array.ndim == 4
        ]
        outputs = max(shape[0], *given[:1])
        expected = (outputs, *shape[1:]), (shape[-1], *shape[1:3], outputs)
        for array, wanted, kind in zip((copy, flipped), expected, ("copy", "flipped"), strict=True):
            if array is None:
                continue
            what = f"{self.name}: {kind} {index}"
            if not self.device.owns(array):
                raise DTypeError(f"{what} is a {type(array).__name__}, no array of the {self.device.name} device")
            if array.dtype != self.storage:
                raise DTypeError(f"{what} has element type {array.dtype}, expected {self.storage}")
            if tuple(array.shape) != wanted or not array.flags.c_contiguous:
                raise ShapeError(
                    f"{what} has shape {tuple(array.shape)}; expected {wanted}, contiguous, for a weight {shape}"
                )
        return outputs

    def __call__(self, gradients: Sequence[Array], lr: Array, scale: Array) -> None:
        """Updates every parameter and its copies."""
        super().__call__(gradients, lr, scale)
        if not self.device.runs_kernels and not np.isnan(scale[0]):
            self.refresh()

    def refresh(self) -> None:
        """Writes the copies of the parameters as they are."""
        if self.device.runs_kernels:
            self._run(self._table_of_refresh, self.parameters, self._zero, self._zero, update=False)
            return
        for parameter, copy, flipped in zip(self.parameters, self.copies, self.flipped, strict=True):
            if copy is not None:
                copy[: len(parameter)] = parameter
            if flipped is not None:
                flipped[..., : len(parameter)] = parameter[:, ::-1, ::-1].transpose(3, 1, 2, 0)

    def _launch(self, gradients: Sequence[Array], lr: Array, scale: Array) -> None:
        self._run(self.table, gradients, lr, scale, update=True)

    def _run(self, table: ArrayTable, gradients: Sequence[Array], lr: Array, scale: Array, update: bool) -> None:
        if not self._on_device:
            numbers = (
                *(np.array(self._shapes, np.int32), np.array(self.rates), np.array(self.decays)),
                np.array(self._tiles, np.int32),
            )
            self._on_device = tuple(self.device.constant(array) for array in numbers)
        addresses = table.addresses(self.parameters, gradients, self.momenta, self.copies, self.flipped)
        arguments = (
            *(addresses, *self._on_device, lr, scale),
            *(len(self.parameters), len(self._tiles), self.momentum, int(update)),
        )
        launch(self.device, self.name, len(self._tiles), (TILE, ROWS), arguments, ElementTypes.of(self.storage))


def _as_weight(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(outputs, taps, channels) of a parameter; a vector in tiles as full as its length allows."""
    if len(shape) == 4:
        return shape[0], shape[1] * shape[2], shape[3]
    size = prod(shape)
    channels = gcd(size, TILE)
    return size // channels, 1, channels
