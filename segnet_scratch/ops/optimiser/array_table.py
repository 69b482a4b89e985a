"""Many arrays in one launch: a table of their addresses, and their elements cut into chunks for the blocks.

An Op has a fixed list of arrays, and a model has as many parameters as it likes. A kernel over all of them gets a table
of addresses, so every array is checked here, when it enters the table, as the launch gate would.
"""

import functools
from collections.abc import Sequence

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.runtime.devices import Array, Device

CHUNK = 1 << 14  # elements of an array that one block works on


def chunks_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(array, first element) of every chunk, in order, for arrays of so many elements."""
    return [(index, start) for index, size in enumerate(sizes) for start in range(0, size, CHUNK)]


class ArrayTable:
    """Columns of arrays, each column with one array for every parameter of a model, in that parameter's shape.

    `like` are the parameters; `op` begins the messages. DTypeError, ShapeError where an array does not fit.
    """

    def __init__(self, device: Device, op: str, like: Sequence[Array]) -> None:
        if not like:
            raise ShapeError(f"{op}: there are no parameters")
        self.device, self.op = device, op
        self.dtype = np.dtype(like[0].dtype)
        self.shapes = [tuple(array.shape) for array in like]
        self.check("parameter", like)
        self.sizes = [array.size for array in like]
        self.chunks = chunks_of(self.sizes)
        self._table: Array | None = None
        self._addresses: tuple[int, ...] = ()

    def check(self, name: str, arrays: Sequence[Array]) -> None:
        """Raises unless these are contiguous arrays of the device, in the parameters' shapes and element type."""
        if len(arrays) != len(self.shapes):
            raise ShapeError(f"{self.op}: {len(arrays)} arrays of {name} for {len(self.shapes)} parameters")
        for index, (array, shape) in enumerate(zip(arrays, self.shapes, strict=True)):
            what = f"{self.op}: {name} {index}"
            if not self.device.owns(array):
                raise DTypeError(f"{what} is a {type(array).__name__}, no array of the {self.device.name} device")
            if array.dtype != self.dtype or self.dtype not in (np.float32, np.float64):
                raise DTypeError(f"{what} has element type {array.dtype}; expected {self.dtype}, float32 or float64")
            if tuple(array.shape) != shape or not array.flags.c_contiguous or array.size == 0:
                raise ShapeError(f"{what} has shape {array.shape}; expected {shape}, contiguous, not empty")

    def addresses(self, *columns: Sequence[Array | None]) -> Array:
        """uint64 (parameters, columns) on the device, 0 for None; uploaded again only where an array has moved."""
        rows = zip(*columns, strict=True)
        addresses = tuple(0 if array is None else self.device.address(array) for row in rows for array in row)
        if addresses != self._addresses:
            self._table = self.device.constant(np.array(addresses, np.uint64).reshape(-1, len(columns)))
            self._addresses = addresses
        return self._table

    @functools.cached_property
    def sizes_on_device(self) -> Array:
        """int64 (parameters): elements of each."""
        return self.device.constant(np.array(self.sizes, np.int64))

    @functools.cached_property
    def chunk_parameter(self) -> Array:
        """int32 (chunks): the parameter of each."""
        return self.device.constant(np.array([index for index, _ in self.chunks], np.int32))

    @functools.cached_property
    def chunk_start(self) -> Array:
        """int64 (chunks): the first element of each in its parameter."""
        return self.device.constant(np.array([start for _, start in self.chunks], np.int64))
