"""Many arrays in one launch (multi-tensor apply): ops on as many arrays as a model has parameters."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DeviceError
from segnet_scratch.ops.op import ELEMENT_THREADS, Buffers, Op, expect, expect_array, spec
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.launch import find_kernel

CHUNK = 1 << 14  # elements of an array that one block works on
NUMBER = spec((1,), np.float64)


def chunks_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(array, first element) of every chunk, in order, for arrays of these sizes."""
    return [(index, start) for index, size in enumerate(sizes) for start in range(0, size, CHUNK)]


def columns(**kinds: Iterable[Array | None]) -> dict[str, Array]:
    """The arrays under the names that an ArraysOp has for them: `gradient0`, `gradient1`, ...; None is left out."""
    return {f"{kind}{i}": a for kind, arrays in kinds.items() for i, a in enumerate(arrays) if a is not None}


class ArraysOp(Op):
    """An op on arrays of these shapes, one of each of its `kinds`: `parameter0`, `gradient0`, `parameter1`, ...

    Kernels get a table of the arrays' addresses, so every array is checked here as the launch gate would do it, and one
    of the chunks for their blocks. Call the class, not `plan`, which would share one object: it holds these tables.
    """

    kinds: ClassVar[tuple[str, ...]]
    beside: ClassVar[tuple[str, ...]] = ()  # further columns of the table of addresses, of arrays that may be missing
    chunk_size = CHUNK

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> None:
        expect(len(shapes) > 0, f"{self.name}: there are no parameters")
        self.shapes, self.sizes = shapes, [prod(shape) for shape in shapes]
        self.inputs = {f"{kind}{i}": spec(shape, dtype) for kind in self.kinds for i, shape in enumerate(shapes)}
        self.outputs = {}
        for name, of_array in self.inputs.items():
            expect_array(self.name, name, of_array)
        owners, starts = zip(*chunks_of(self.sizes), strict=True)
        self.chunks = len(owners)
        self.tables: dict[str, np.ndarray] = {
            "sizes": np.array(self.sizes, np.int64),
            "chunk_parameter": np.array(owners, np.int32),  # of each chunk
            "chunk_start": np.array(starts, np.int64),  # the first element of each in its parameter
        }
        self._device: Device | None = None
        self._held: dict[str, Array] = {}  # the tables that are on it

    def of(self, b: Buffers, kind: str) -> list[Any]:
        """The arrays of a kind; None where there is none."""
        return [getattr(b, f"{kind}{i}", None) for i in range(len(self.shapes))]

    def run(self, device: Device, b: Buffers) -> None:
        for name in self.inputs:
            if not device.owns(array := getattr(b, name, None)):
                what = f"{self.name}: {name} is a {type(array).__name__}"
                raise DeviceError(f"{what}, no array of the {device.name} device; upload it there")
        self.check({name: getattr(b, name) for name in self.inputs})
        super().run(device, b)

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, self.chunks)

    def kernel(
        self, device: Device, name: str, b: Buffers, grid: Any = None, block: Any = ELEMENT_THREADS, **given: Any
    ) -> None:
        """One launch, with the tables that the kernel takes; that of addresses again only where an array has moved."""
        if device is not self._device:
            self._device, self._held = device, {}
        rows = zip(*(self.of(b, kind) for kind in (*self.kinds, *self.beside)), strict=True)
        of_arrays = [[0 if array is None else device.address(array) for array in row] for row in rows]
        addresses = np.array(of_arrays, np.uint64)
        if not np.array_equal(addresses, self.tables.get("addresses", ())):
            self.tables["addresses"] = addresses
            self._held.pop("addresses", None)
        for parameter in find_kernel(name).parameters:
            if parameter.name in self.tables and parameter.name not in self._held:
                self._held[parameter.name] = device.constant(self.tables[parameter.name])
        super().kernel(device, name, b, grid, block, **self._held, **given)
