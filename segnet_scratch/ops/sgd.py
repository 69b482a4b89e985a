"""One step of SGD with momentum over all parameters of a model, in one launch."""

from collections.abc import Sequence

import numpy as np

from segnet_scratch.cpu.workers import parallel_for
from segnet_scratch.device import Array, Device
from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.kernels import ElementTypes, launch
from segnet_scratch.ops.op import ELEMENT_THREADS

CHUNK = 1 << 14  # elements of a parameter that one block updates


class SgdStep:
    """m = momentum m + g + decay w; w = w - rate lr m, in place, for parameters that stay where they are.

    This is no Op: an Op has a fixed list of arrays, and a model has as many parameters as it likes. The kernel gets a
    table of addresses, so every array is checked here, when it enters the table, as the launch gate would.
    `rates` and `decays` are one number a parameter.
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
        if not parameters:
            raise ShapeError("sgd: there are no parameters to update")
        self.device, self.momentum = device, float(momentum)
        self.parameters, self.momenta = list(parameters), list(momenta)
        self.rates, self.decays = list(rates), list(decays)
        self.dtype = np.dtype(parameters[0].dtype)
        for name, arrays in (("parameter", self.parameters), ("momentum", self.momenta)):
            self._check(name, arrays)
        self._table: Array | None = None
        self._addresses: tuple[int, ...] = ()
        self._fixed: tuple[Array, ...] = ()
        self.chunks = [
            (index, start) for index, array in enumerate(self.parameters) for start in range(0, array.size, CHUNK)
        ]

    def _check(self, name: str, arrays: Sequence[Array]) -> None:
        if len(arrays) != len(self.parameters):
            raise ShapeError(f"sgd: {len(arrays)} arrays of {name} for {len(self.parameters)} parameters")
        for index, (array, parameter) in enumerate(zip(arrays, self.parameters, strict=True)):
            what = f"sgd: {name} {index}"
            if not self.device.owns(array):
                raise DTypeError(f"{what} is a {type(array).__name__}, no array of the {self.device.name} device")
            if array.dtype != self.dtype or self.dtype not in (np.float32, np.float64):
                raise DTypeError(f"{what} has element type {array.dtype}; expected {self.dtype}, float32 or float64")
            if array.shape != parameter.shape or not array.flags.c_contiguous or array.size == 0:
                raise ShapeError(f"{what} has shape {array.shape}; expected {parameter.shape}, contiguous, not empty")

    def __call__(self, gradients: Sequence[Array], lr: Array) -> None:
        """Updates every parameter. `lr` is float64 (1) on the device."""
        self._check("gradient", gradients)
        if lr.dtype != np.float64:
            raise DTypeError(f"sgd: lr has element type {lr.dtype}, expected float64")
        if tuple(lr.shape) != (1,):
            raise ShapeError(f"sgd: lr has shape {tuple(lr.shape)}, expected (1,)")
        if self.device.runs_kernels:
            self._launch(gradients, lr)
        else:
            rate = float(lr[0])
            parallel_for(len(self.parameters), lambda i: self._update(i, gradients[i], rate))

    def _launch(self, gradients: Sequence[Array], lr: Array) -> None:
        device = self.device
        if not self._fixed:
            sizes = np.array([array.size for array in self.parameters], np.int64)
            columns = np.array(self.rates), np.array(self.decays)
            owners = np.array([index for index, _ in self.chunks], np.int32)
            starts = np.array([start for _, start in self.chunks], np.int64)
            self._fixed = tuple(device.constant(array) for array in (sizes, *columns, owners, starts))
        rows = zip(self.parameters, gradients, self.momenta, strict=True)
        addresses = tuple(device.address(array) for row in rows for array in row)
        if addresses != self._addresses:
            self._table = device.constant(np.array(addresses, np.uint64).reshape(-1, 3))
            self._addresses = addresses
        arguments = (
            self._table,
            *self._fixed,
            lr,
            len(self.parameters),
            len(self.chunks),
            CHUNK,
            self.momentum,
        )
        launch(device, self.name, len(self.chunks), ELEMENT_THREADS, arguments, ElementTypes.of(self.dtype))

    def _update(self, index: int, gradient: np.ndarray, lr: float) -> None:
        sgd_reference(
            *(self.parameters[index], gradient, self.momenta[index]),
            *(self.rates[index] * lr, self.decays[index], self.momentum),
        )


def sgd_reference(
    parameter: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray,
    lr: float,
    decay: float,
    momentum: float,
) -> None:
    """The definition, for one parameter, in place; in pieces that stay in a cache."""
    w, g, m = parameter.reshape(-1), gradient.reshape(-1), velocity.reshape(-1)
    for start in range(0, w.size, CHUNK):
        piece = slice(start, start + CHUNK)
        m[piece] = momentum * m[piece] + (g[piece] + decay * w[piece])
        w[piece] -= lr * m[piece]
