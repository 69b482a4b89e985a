"""The Euclidean length of all gradients of a model together, and the factor that clips it, left on the device."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.op import ELEMENT_THREADS
from segnet_scratch.ops.optimiser.array_table import CHUNK, ArrayTable, chunks_of
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.launch import ElementTypes, launch
from segnet_scratch.runtime.workers import parallel_for


class GradientNorm:
    """norm = sqrt(sum of squares of every gradient); scale = min(1, largest / norm) (Pascanu et al., arXiv 1211.5063).

    One element that is not finite makes the norm not finite, and from then on the scale is NaN, whatever follows: the
    update that takes it (sgd.py) moves nothing until somebody writes 1 there. Every sum is carried in double, in an
    order that depends on the shapes alone.

    No Op, because its list of arrays is as long as the model's (array_table.py). It writes float64 arrays that it is
    given, which stay where they are: squares (parameters), the sum of each gradient's squares; norm (1); scale (1);
    partials (chunks) is workspace, of `len(chunks_of(sizes))` elements.
    """

    def __init__(
        self,
        device: Device,
        parameters: Sequence[Array],
        largest: float,
        *,
        squares: Array,
        norm: Array,
        scale: Array,
        partials: Array,
    ) -> None:
        if not largest > 0:
            raise ShapeError(f"gradient_norm: the largest norm is {largest}; expected a positive number, or infinity")
        self.table = ArrayTable(device, "gradient_norm", parameters)
        self.device, self.largest = device, float(largest)
        self.squares, self.norm, self.scale, self.partials = squares, norm, scale, partials
        shapes = {"squares": len(parameters), "norm": 1, "scale": 1, "partials": len(self.table.chunks)}
        for name, size in shapes.items():
            array = getattr(self, name)
            if array.dtype != np.float64:
                raise DTypeError(f"gradient_norm: {name} has element type {array.dtype}, expected float64")
            if tuple(array.shape) != (size,):
                raise ShapeError(f"gradient_norm: {name} has shape {tuple(array.shape)}, expected ({size},)")
        # Where the chunks of each parameter begin, and the end of the last one.
        counts = (len(chunks_of([size])) for size in self.table.sizes)
        self._first_chunk = device.constant(np.array([0, *accumulate(counts)], np.int32))

    def __call__(self, gradients: Sequence[Array]) -> None:
        """Writes squares, norm and scale of these gradients; does not wait for the device."""
        self.table.check("gradient", gradients)
        if self.device.runs_kernels:
            self._launch(gradients)
            return
        parallel_for(len(gradients), lambda i: self._add_up(i, gradients[i]))
        self.norm[0] = norm = np.sqrt(self.squares.sum())
        if not np.isnan(self.scale[0]):
            clipped = self.largest / norm if norm > self.largest else 1
            self.scale[0] = clipped if np.isfinite(norm) else np.nan

    def _launch(self, gradients: Sequence[Array]) -> None:
        table = self.table
        types, counts = ElementTypes.of(table.dtype), (len(gradients), len(table.chunks))
        arrays = (table.addresses(gradients), table.sizes_on_device, table.chunk_parameter, table.chunk_start)
        arguments = (*arrays, self.partials, *counts, CHUNK)
        launch(self.device, "gradient_norm_partial", len(table.chunks), ELEMENT_THREADS, arguments, types)
        merge = (self.partials, self._first_chunk, self.squares, self.norm, self.scale, *counts, self.largest)
        launch(self.device, "gradient_norm_merge", 1, ELEMENT_THREADS, merge, types)

    def _add_up(self, index: int, gradient: np.ndarray) -> None:
        flat, total = gradient.reshape(-1), 0.0
        for start in range(0, flat.size, CHUNK):
            piece = flat[start : start + CHUNK].astype(np.float64)
            total += float(piece @ piece)
        self.squares[index] = total
