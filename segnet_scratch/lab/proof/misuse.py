"""Launches that are wrong, of any kernel, derived from its signature: what the launch gate has to refuse.

Each kind of misuse turns a right call into wrong ones, and says which error each must meet and what its message must
name. NOT_APPLICABLE holds the kinds that not every kernel can be misused by, with the reason.
"""

import ctypes
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from segnet_scratch.errors import DeviceError, DTypeError, LaunchError, SegnetError, ShapeError
from segnet_scratch.runtime.devices import Device, NumpyDevice
from segnet_scratch.runtime.gate import MAX_BLOCK, MAX_GRID
from segnet_scratch.runtime.launch import ElementTypes, Kernel, Launch, launch
from segnet_scratch.runtime.multiprocessor import MAX_SHARED
from segnet_scratch.runtime.signature import Parameter
from segnet_scratch.runtime.tensor_map import TensorMap

FLOAT32 = ElementTypes.of(np.dtype(np.float32))
FLOAT64 = ElementTypes.of(np.dtype(np.float64))
SENTINEL = 0xA7  # every byte of the arrays of a call


class Recorder(NumpyDevice):
    """Passes for the host device, but notes a launch instead of carrying it out; it needs no compiler."""

    name = "host"
    runs_kernels = True

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def execute(self, launch: Launch) -> None:
        self.launches.append(launch)


@dataclass(frozen=True)
class Call:
    """A launch, right or wrong, of one kernel."""

    kernel: Kernel
    arguments: tuple[Any, ...]
    grid: Any = (1, 1, 1)
    block: Any = (1, 1, 1)
    shared: Any = 0
    types: ElementTypes = FLOAT32

    def put(self, name: str, value: Any) -> "Call":
        """The same with another value for one argument."""
        index = [p.name for p in self.kernel.parameters].index(name)
        return replace(self, arguments=(*self.arguments[:index], value, *self.arguments[index + 1 :]))

    @property
    def arrays(self) -> list[tuple[Parameter, np.ndarray]]:
        """The pointer parameters and their arrays."""
        return [(p, a) for p, a in zip(self.kernel.parameters, self.arguments, strict=True) if p.pointer]

    def scalars(self, kinds: str) -> list[Parameter]:
        """The scalar parameters whose type is of these kinds ("i", "u", "f")."""
        return [p for p in self.kernel.parameters if p.scalar and p.dtype(self.types).kind in kinds]

    @property
    def maps(self) -> list[tuple[Parameter, TensorMap]]:
        """The tensor maps and their parameters."""
        return [(p, a) for p, a in zip(self.kernel.parameters, self.arguments, strict=True) if p.tensor_map]

    def launch(self, device: Device) -> None:
        """Through the gate."""
        launch(device, self.kernel, self.grid, self.block, self.arguments, self.types, self.shared)


def sentinel_array(shape: Any, dtype: Any) -> np.ndarray:
    """An array of bytes that nobody writes by chance."""
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = SENTINEL
    return array


def valid_call(kernel: Kernel, types: ElementTypes | None = None) -> Call:
    """A launch that the gate lets through, derived from the signature alone.

    Integers are 4 or 6, so that arrays have sizes that are no primes and can be transposed; 8 where there are tensor
    maps, whose rows are multiples of 16 bytes.
    """
    types = types or ElementTypes.named(kernel.source.elements[0])
    number = 8 if any(p.tensor_map for p in kernel.parameters) else 4
    numbers = {p.name: number + 2 if p.c_type == "int64" else number for p in kernel.parameters if p.scalar}
    arguments: list[Any] = []
    for p in kernel.parameters:
        shape = p.extent_shape(numbers) if p.extent_code else (number,)
        if p.pointer:
            arguments.append(sentinel_array(shape, p.dtype(types)))
        elif p.tensor_map:
            arguments.append(_map_of(sentinel_array(shape if p.extent_code else (8, 8), types.storage)))
        else:
            arguments.append(numbers[p.name] if p.dtype(types).kind in "iu" else 0.5)
    return Call(kernel, tuple(arguments), types=types)


def _map_of(array: Any) -> TensorMap:
    return TensorMap(array, (1,) * (len(array.shape) - 1) + (8,))


Attempt = tuple[Call, type[SegnetError], str]  # a wrong call, the error it must meet, what the message must name
MISUSES: dict[str, Callable[[Call], Iterator[Attempt]]] = {}


def misuse(kind: str) -> Callable[[Callable[[Call], Iterator[Attempt]]], None]:
    """Registers a function that turns a right call into wrong ones."""

    def register(attempts: Callable[[Call], Iterator[Attempt]]) -> None:
        MISUSES[kind] = attempts

    return register


@misuse("too few arguments")
def _(call: Call) -> Iterator[Attempt]:
    for arguments in (call.arguments[:-1], call.arguments[1:], ()):
        yield replace(call, arguments=arguments), LaunchError, call.kernel.parameters[-1].name


@misuse("too many arguments")
def _(call: Call) -> Iterator[Attempt]:
    for extra in (1, None, np.zeros(4, np.float32)):
        yield replace(call, arguments=(*call.arguments, extra)), LaunchError, call.kernel.parameters[-1].name


@misuse("an element type of another width or kind")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        for dtype in (np.int8, np.int16, np.float16, np.complex64, np.bool_, object, a.dtype.newbyteorder()):
            if np.dtype(dtype) != a.dtype:
                yield call.put(p.name, np.ones(a.shape, dtype)), DTypeError, p.name


@misuse("float64 for float32")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if a.dtype == np.float32:
            yield call.put(p.name, a.astype(np.float64)), DTypeError, p.name


@misuse("float32 for float64")
def _(call: Call) -> Iterator[Attempt]:
    if "float64" not in call.kernel.source.elements:
        return
    call = valid_call(call.kernel, FLOAT64)
    for p, a in call.arrays:
        if a.dtype == np.float64:
            yield call.put(p.name, np.ones(a.shape, np.float32)), DTypeError, p.name


@misuse("signed for unsigned and back")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if a.dtype.kind in "iu":
            other = np.dtype(f"{'iu'[a.dtype.kind == 'i']}{a.dtype.itemsize}")
            yield call.put(p.name, a.view(other)), DTypeError, p.name


@misuse("every second element of an array")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if a.size > 1:
            yield call.put(p.name, sentinel_array(2 * a.size, a.dtype)[::2]), LaunchError, p.name


@misuse("an array backwards")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if a.size > 1:
            yield call.put(p.name, a.reshape(-1)[::-1]), LaunchError, p.name


@misuse("a transposed array")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if a.size % 2 == 0 and a.size > 2:
            yield call.put(p.name, a.reshape(2, -1).T), LaunchError, p.name


@misuse("an array at an address that is no multiple of its element size")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if a.itemsize > 1:
            shifted = np.frombuffer(bytearray(a.nbytes + 1), np.uint8)[1:].view(a.dtype)
            assert shifted.flags.c_contiguous
            yield call.put(p.name, shifted), LaunchError, p.name


@misuse("a read-only output")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if not p.const:
            frozen = a.copy()
            frozen.flags.writeable = False
            yield call.put(p.name, frozen), LaunchError, p.name


@misuse("None for an array")
def _(call: Call) -> Iterator[Attempt]:
    for p, _ in call.arrays:
        if not p.optional:
            yield call.put(p.name, None), LaunchError, p.name


@misuse("None for a number")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("iuf"):
        yield call.put(p.name, None), DTypeError, p.name


@misuse("an empty array")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        for shape in ((0,), (4, 0, 4)):
            yield call.put(p.name, np.empty(shape, a.dtype)), ShapeError, p.name


@misuse("an array one element short")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if p.extent is not None:
            yield call.put(p.name, sentinel_array(a.size - 1, a.dtype)), ShapeError, p.name


@misuse("an array one element long")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        if p.extent is not None:
            yield call.put(p.name, sentinel_array(a.size + 1, a.dtype)), ShapeError, p.name


@misuse("sizes of which an even number is negative")
def _(call: Call) -> Iterator[Attempt]:
    # The number of elements comes out right: (-4) x (-4) = 16.
    negative = tuple(-a if isinstance(a, int) else a for a in call.arguments)
    first = next(p for p in call.kernel.parameters if p.extent is not None and re.search("[a-z]", p.extent))
    yield replace(call, arguments=negative), ShapeError, first.name


@misuse("a size of zero")
def _(call: Call) -> Iterator[Attempt]:
    used = " ".join(p.extent for p in call.kernel.parameters if p.extent)
    for p in call.scalars("iu"):
        if re.search(rf"\b{p.name}\b", used):
            yield call.put(p.name, 0), ShapeError, "expected"


@misuse("a list for an array")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        yield call.put(p.name, a.tolist()), DeviceError, p.name


@misuse("an array of another library")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.arrays:
        alike = SimpleNamespace(
            **{name: getattr(a, name) for name in ("dtype", "shape", "size", "nbytes", "strides", "flags", "ctypes")},
            __array_interface__=a.__array_interface__,
        )
        memory = a.view(np.uint8).data  # Python's buffers know no bfloat16
        for foreign in (memory, alike, (ctypes.c_float * a.size)(), a.tobytes(), a.ctypes.data, a.flat[0]):
            yield call.put(p.name, foreign), DeviceError, p.name


@misuse("an array for a number")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("iuf"):
        for value in (np.ones(1, p.dtype(call.types)), np.array(4, p.dtype(call.types)), [4]):
            yield call.put(p.name, value), DTypeError, p.name


@misuse("a float for an integer")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("iu"):
        for value in (4.0, np.float32(4), np.float64(4), float("nan"), 4 + 0j):
            yield call.put(p.name, value), DTypeError, p.name


@misuse("a bool for a number")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("iuf"):
        for value in (True, np.True_):
            yield call.put(p.name, value), DTypeError, p.name


@misuse("text for a number")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("iuf"):
        for value in ("4", b"4"):
            yield call.put(p.name, value), DTypeError, p.name


@misuse("an integer over 2^31, or over 2^63 for int64")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("iu"):
        limits = np.iinfo(p.dtype(call.types))
        for value in (limits.max + 1, limits.min - 1, 2**64, -(2**64)):
            yield call.put(p.name, value), LaunchError, p.name


@misuse("a 64-bit NumPy integer out of range")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("iu"):
        limits = np.iinfo(p.dtype(call.types))
        for value in (np.uint64(limits.max + 1), *([np.int64(limits.min - 1)] if limits.bits < 64 else [])):
            yield call.put(p.name, value), LaunchError, p.name


@misuse("a float that becomes infinite")
def _(call: Call) -> Iterator[Attempt]:
    for p in call.scalars("f"):
        for value in (10**400, -(10**400)) + ((1e39, np.float64(-1e39)) if p.dtype(call.types) == np.float32 else ()):
            yield call.put(p.name, value), LaunchError, p.name


@misuse("an output that overlaps another array")
def _(call: Call) -> Iterator[Attempt]:
    for (p, a), (q, b) in itertools.permutations(call.arrays, 2):
        if p.const:
            continue
        for start in sorted({0, (a.nbytes - 1) // 8 * 8}):  # the same beginning; the last element only
            memory = sentinel_array(start + a.nbytes + b.nbytes, np.uint8)
            both = call.put(p.name, memory[: a.nbytes].view(a.dtype))
            yield both.put(q.name, memory[start : start + b.nbytes].view(b.dtype)), LaunchError, p.name
            yield both.put(q.name, memory[start : start + b.nbytes].view(b.dtype)), LaunchError, q.name


@misuse("something else for a tensor map")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.maps:
        for other in (a.array, None, 4, a.host_bytes(), a.array.tobytes()):
            yield call.put(p.name, other), DTypeError, p.name


@misuse("a tensor map of another element type")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.maps:
        yield call.put(p.name, _map_of(sentinel_array(a.array.shape, np.float32))), DTypeError, p.name


@misuse("a tensor map of an array of another shape")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.maps:
        if p.extent is not None:
            for shape in (a.array.shape[::-1], (2, *a.array.shape[1:]), (1, *a.array.shape)[-4:]):
                if shape != a.array.shape:
                    yield call.put(p.name, _map_of(sentinel_array((*shape[:-1], 8), a.array.dtype))), ShapeError, p.name


@misuse("a tensor map of an array of another library")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.maps:
        names = ("dtype", "shape", "size", "itemsize", "nbytes", "strides", "flags", "ctypes")
        alike = SimpleNamespace(**{name: getattr(a.array, name) for name in names})
        yield call.put(p.name, _map_of(alike)), DeviceError, p.name


@misuse("a tensor map of an array at an address that is no multiple of 16")
def _(call: Call) -> Iterator[Attempt]:
    for p, a in call.maps:
        memory = sentinel_array(a.array.nbytes + 32, np.uint8)
        start = -memory.ctypes.data % 16 + a.array.itemsize
        shifted = memory[start : start + a.array.nbytes].view(a.array.dtype).reshape(a.array.shape)
        yield call.put(p.name, _map_of(shifted)), LaunchError, p.name


@misuse("an output that overlaps the array of a tensor map")
def _(call: Call) -> Iterator[Attempt]:
    for (p, a), (q, b) in itertools.product(call.maps, call.arrays):
        if not q.const and b.nbytes <= a.array.nbytes:
            yield call.put(q.name, a.array.view(np.uint8).reshape(-1)[: b.nbytes].view(b.dtype)), LaunchError, p.name


@misuse("a grid of zero, negative or too many blocks")
def _(call: Call) -> Iterator[Attempt]:
    for axis, limit in enumerate(MAX_GRID):
        for n in (0, -1, limit + 1, 2**40):
            grid = (1,) * axis + (n,)
            yield replace(call, grid=grid), LaunchError, "grid"
    for size in (0, -1, (1, 1, 1, 1)):
        yield replace(call, grid=size), LaunchError, "grid"


@misuse("a grid or block that is no integer")
def _(call: Call) -> Iterator[Attempt]:
    for size in (1.0, (1, 1.5), None, "11", True, np.float64(1), (1, None), (1, True)):
        yield replace(call, grid=size), LaunchError, "grid"
        yield replace(call, block=size), LaunchError, "block"


@misuse("a block of zero, negative or over 1024 threads")
def _(call: Call) -> Iterator[Attempt]:
    for axis, limit in enumerate(MAX_BLOCK):
        for n in (0, -1, limit + 1):
            yield replace(call, block=(1,) * axis + (n,)), LaunchError, "block"
    for block in (1025, (32, 33), (16, 16, 5), (2, 9, 64), (1, 1, 1, 1)):
        yield replace(call, block=block), LaunchError, "block"


@misuse("dynamic shared memory out of range")
def _(call: Call) -> Iterator[Attempt]:
    for shared in (MAX_SHARED + 1, -1, 2**40, 16.0, None, "16", True):
        yield replace(call, shared=shared), LaunchError, "dynamic shared memory"


NOT_APPLICABLE = {
    "float64 for float32": "has no array of storage_t or accumulate_t",
    "float32 for float64": "has no array of storage_t, accumulate_t or double, or is for tensor cores",
    "signed for unsigned and back": "has no array of integers",
    "an array at an address that is no multiple of its element size": "has arrays of bytes only",
    "a read-only output": "has no output among its arrays: it writes through a table of addresses",
    "an output that overlaps another array": "has no output among its arrays: it writes through a table of addresses",
    "a float that becomes infinite": "has no float parameter",
    **dict.fromkeys(
        (kind for kind in MISUSES if "tensor map" in kind), "has no tensor map, or no shape comment of one"
    ),
}
