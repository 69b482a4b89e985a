"""One step of SGD with momentum over all parameters of a model, in one launch."""

from collections.abc import Sequence

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.op import ELEMENT_THREADS
from segnet_scratch.ops.optimiser.array_table import CHUNK, ArrayTable
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.launch import ElementTypes, launch
from segnet_scratch.runtime.workers import parallel_for


class SgdStep:
    """m = momentum m + scale g + decay w; w = w - rate lr m, in place, for parameters that stay where they are.

    No Op, because its list of arrays is as long as the model's (array_table.py). `rates` and `decays` are one
    number a parameter.
    """

    name = "sgd_step"

    def __init__(
        self,
        device: Device,
        parameters: Sequence[Array],
        momenta: Sequence[Array],
        rates: Sequence[float],
        decays: Sequence[float],
        momentum: float,
    ) -> None:
        self.table = ArrayTable(device, "sgd", parameters)
        self.table.check("momentum", momenta)
        self.device, self.momentum = device, float(momentum)
        self.parameters, self.momenta = list(parameters), list(momenta)
        self.rates, self.decays = list(rates), list(decays)
        self._columns: tuple[Array, ...] = ()

    def __call__(self, gradients: Sequence[Array], lr: Array, scale: Array) -> None:
        """Updates every parameter. `lr` and `scale`, which multiplies all gradients, are float64 (1) on the device.

        Where `scale` is NaN, nothing moves.
        """
        self.table.check("gradient", gradients)
        for name, number in (("lr", lr), ("scale", scale)):
            _check_number(name, number)
        if self.device.runs_kernels:
            self._launch(gradients, lr, scale)
        elif not np.isnan(scale[0]):
            rate, factor = float(lr[0]), float(scale[0])
            parallel_for(len(self.parameters), lambda i: self._update(i, gradients[i], rate, factor))

    def _launch(self, gradients: Sequence[Array], lr: Array, scale: Array) -> None:
        table = self.table
        if not self._columns:
            self._columns = tuple(self.device.constant(np.array(column)) for column in (self.rates, self.decays))
        arguments = (
            table.addresses(self.parameters, gradients, self.momenta),
            *(table.sizes_on_device, *self._columns, table.chunk_parameter, table.chunk_start),
            *(lr, scale, len(self.parameters), len(table.chunks), CHUNK, self.momentum),
        )
        launch(self.device, self.name, len(table.chunks), ELEMENT_THREADS, arguments, ElementTypes.of(table.dtype))

    def _update(self, index: int, gradient: np.ndarray, lr: float, scale: float) -> None:
        sgd_reference(
            *(self.parameters[index], gradient, self.momenta[index]),
            *(self.rates[index] * lr, self.decays[index], self.momentum, scale),
        )


class KeepFinite:
    """Arrays that a step writes before it is known whether its gradients are finite, and a copy of each.

    Where they are, the copies become the arrays; where not, which a scale of NaN says, the arrays become the copies.
    """

    name = "keep_finite"

    def __init__(self, device: Device, arrays: Sequence[Array]) -> None:
        self.table = ArrayTable(device, self.name, arrays)
        self.device, self.arrays = device, list(arrays)
        self.kept = [device.copy(array) for array in arrays]

    def __call__(self, scale: Array) -> None:
        """`scale` as SgdStep takes it."""
        _check_number("scale", scale)
        if not self.device.runs_kernels:
            failed = bool(np.isnan(scale[0]))
            for array, kept in zip(self.arrays, self.kept, strict=True):
                target, source = (array, kept) if failed else (kept, array)
                target[...] = source
            return
        table = self.table
        arguments = (
            *(table.addresses(self.arrays, self.kept), table.sizes_on_device, table.chunk_parameter),
            *(table.chunk_start, scale, len(self.arrays), len(table.chunks), CHUNK),
        )
        launch(self.device, self.name, len(table.chunks), ELEMENT_THREADS, arguments, ElementTypes.of(table.dtype))


def _check_number(name: str, number: Array) -> None:
    if number.dtype != np.float64:
        raise DTypeError(f"sgd: {name} has element type {number.dtype}, expected float64")
    if tuple(number.shape) != (1,):
        raise ShapeError(f"sgd: {name} has shape {tuple(number.shape)}, expected (1,)")


def sgd_reference(
    parameter: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray,
    lr: float,
    decay: float,
    momentum: float,
    scale: float,
) -> None:
    """The definition, for one parameter, in place; in pieces that stay in a cache."""
    w, g, m = parameter.reshape(-1), gradient.reshape(-1), velocity.reshape(-1)
    for start in range(0, w.size, CHUNK):
        piece = slice(start, start + CHUNK)
        scaled = g[piece] if scale == 1 else scale * g[piece]
        m[piece] = momentum * m[piece] + (scaled + decay * w[piece])
        w[piece] -= lr * m[piece]
