"""The launch gate refuses misuse of every kernel, and launches nothing.

Launches that are wrong, of any kernel, are derived from its signature. Each kind of misuse turns a right call into
wrong ones, and says which error each must meet and what its message must name. NOT_APPLICABLE holds the kinds that not
every kernel can be misused by, with the reason.
"""

import ctypes
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from segnet_scratch.errors import DeviceError, DTypeError, LaunchError, SegnetError, ShapeError
from segnet_scratch.lab.proof.launches import DryDevice, kernels_of
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.gate import MAX_BLOCK, MAX_GRID
from segnet_scratch.runtime.launch import ElementTypes, Kernel, find_kernel, launch, shipped_kernels
from segnet_scratch.runtime.occupancy import MAX_SHARED
from segnet_scratch.runtime.signature import Parameter
from segnet_scratch.runtime.tensor_map import TensorMap

FLOAT32 = ElementTypes.of(np.dtype(np.float32))
FLOAT64 = ElementTypes.of(np.dtype(np.float64))
SENTINEL = 0xA7  # every byte of the arrays of a call


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

    def of(self, kind: str) -> list[tuple[Parameter, Any]]:
        """Its "arrays" or "maps", each with its parameter; of "scalars", "integers" and "floats" the types instead."""
        pairs = list(zip(self.kernel.parameters, self.arguments, strict=True))
        if kind in ("arrays", "maps"):
            return [(p, value) for p, value in pairs if (p.pointer if kind == "arrays" else p.tensor_map)]
        kinds = {"scalars": "biuf", "integers": "iu", "floats": "f"}[kind]
        scalars = [(p, p.dtype(self.types)) for p, _ in pairs if p.scalar]
        return [(p, dtype) for p, dtype in scalars if dtype.kind in kinds]

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
            arguments.append(_map_of(sentinel_array(shape if p.extent_code else (8, 8), types.factors)))
        else:
            arguments.append(numbers[p.name] if p.dtype(types).kind in "iu" else 0.5)
    return Call(kernel, tuple(arguments), types=types)


def _map_of(array: Any) -> TensorMap:
    return TensorMap(array, (1,) * (len(array.shape) - 1) + (8,))


Attempt = tuple[Call, type[SegnetError], str]  # a wrong call, the error it must meet, what the message must name
Wrong = Callable[[Parameter, Any], Sequence[Any]]


def _as(a: np.ndarray, *others: Any) -> list[np.ndarray]:
    """Ones of other element types."""
    return [np.ones(a.shape, other) for other in others if np.dtype(other) != a.dtype]


def _shifted(a: np.ndarray, alignment: int, by: int) -> np.ndarray:
    """An array like this at an address so many bytes after a multiple of the alignment."""
    memory = sentinel_array(a.nbytes + 2 * alignment, np.uint8)
    start = -memory.ctypes.data % alignment + by
    return memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)


def _alike(a: np.ndarray, *more: str) -> SimpleNamespace:
    """What another library's array would look like."""
    names = ("dtype", "shape", "size", "nbytes", "strides", "flags", "ctypes", *more)
    return SimpleNamespace(**{name: getattr(a, name) for name in names})


# What may stand, wrongly, in the place of each of the arrays, numbers or tensor maps of a call, and the error it must
# meet. A function gets the parameter, and the right array or tensor map, or the element type of a number.
INSTEAD: dict[tuple[str, type[SegnetError]], dict[str, Wrong]] = {
    ("arrays", DTypeError): {
        "an element type of another width or kind": lambda p, a: _as(
            a, np.int8, np.int16, np.float16, np.complex64, np.bool_, object, a.dtype.newbyteorder()
        ),
        "float64 for float32": lambda p, a: _as(a, np.float64) * (a.dtype == np.float32),
        "signed for unsigned and back": lambda p, a: (
            _as(a, f"i{a.itemsize}", f"u{a.itemsize}") * (a.dtype.kind in "iu")
        ),
    },
    ("arrays", LaunchError): {
        "every second element of an array": lambda p, a: [sentinel_array(2 * a.size, a.dtype)[::2]] * (a.size > 1),
        "an array backwards": lambda p, a: [a.reshape(-1)[::-1]] * (a.size > 1),
        "a transposed array": lambda p, a: [a.reshape(2, -1).T] if a.size % 2 == 0 and a.size > 2 else [],
        "an array at an address that is no multiple of its element size": lambda p, a: (
            [_shifted(a, a.itemsize, 1)] * (a.itemsize > 1)
        ),
        "a read-only output": lambda p, a: [np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape)] * (not p.const),
        "None for an array": lambda p, a: [None] * (not p.optional),
    },
    ("arrays", ShapeError): {
        "an empty array": lambda p, a: [np.empty(shape, a.dtype) for shape in ((0,), (4, 0, 4))],
        "an array one element short": lambda p, a: [sentinel_array(a.size - 1, a.dtype)] * (p.extent is not None),
        "an array one element long": lambda p, a: [sentinel_array(a.size + 1, a.dtype)] * (p.extent is not None),
    },
    ("arrays", DeviceError): {
        "a list for an array": lambda p, a: [a.tolist()],
        "an array of another library": lambda p, a: [
            *(a.view(np.uint8).data, _alike(a, "__array_interface__")),  # Python's buffers know no bfloat16
            *((ctypes.c_float * a.size)(), a.tobytes(), a.ctypes.data, a.flat[0]),
        ],
    },
    ("scalars", DTypeError): {
        "None for a number": lambda p, dtype: [None],
        "an array for a number": lambda p, dtype: [np.ones(1, dtype), np.array(4, dtype), [4]],
        "a bool for a number": lambda p, dtype: [True, np.True_],
        "text for a number": lambda p, dtype: ["4", b"4"],
    },
    ("integers", DTypeError): {
        "a float for an integer": lambda p, dtype: [4.0, np.float32(4), np.float64(4), float("nan"), 4 + 0j]
    },
    ("integers", LaunchError): {
        "an integer over 2^31, or over 2^63 for int64": lambda p, dtype: [
            *(np.iinfo(dtype).max + 1, np.iinfo(dtype).min - 1, 2**64, -(2**64))
        ],
        "a 64-bit NumPy integer out of range": lambda p, dtype: [
            *(np.uint64(np.iinfo(dtype).max + 1), *[np.int64(-(2**31) - 1)] * (dtype.itemsize == 4))
        ],
    },
    ("floats", LaunchError): {
        "a float that becomes infinite": lambda p, dtype: [
            *(10**400, -(10**400), *[1e39, np.float64(-1e39)] * (dtype == np.float32))
        ]
    },
    ("maps", DTypeError): {
        "something else for a tensor map": lambda p, m: [m.array, None, 4, m.host_bytes(), m.array.tobytes()],
        "a tensor map of another element type": lambda p, m: [_map_of(sentinel_array(m.array.shape, np.float32))],
    },
    ("maps", ShapeError): {
        "a tensor map of an array of another shape": lambda p, m: [
            _map_of(sentinel_array((*shape[:-1], 8), m.array.dtype))
            for shape in (m.array.shape[::-1], (2, *m.array.shape[1:]), (1, *m.array.shape)[-4:])
            if p.extent is not None and shape != m.array.shape
        ]
    },
    ("maps", DeviceError): {
        "a tensor map of an array of another library": lambda p, m: [_map_of(_alike(m.array, "itemsize"))]
    },
    ("maps", LaunchError): {
        "a tensor map of an array at an address that is no multiple of 16": lambda p, m: [
            _map_of(_shifted(m.array, 16, m.array.itemsize))
        ]
    },
}


def _put_instead(arguments: str, error: type[SegnetError], wrong: Wrong, call: Call) -> Iterator[Attempt]:
    for p, right in call.of(arguments):
        for value in wrong(p, right):
            yield call.put(p.name, value), error, p.name


def _outside(limits: tuple[int, ...], *others: Any) -> list[Any]:
    """Sizes of a grid or block that are wrong in one axis, and others."""
    return [(1,) * axis + (n,) for axis, limit in enumerate(limits) for n in (0, -1, limit + 1, 2**40)] + [*others]


# The same for what is no argument: by kind the field of a Call, and what may stand there.
BLOCKS = [(32, 33), (16, 16, 5), (2, 9, 64), (1, 1, 1, 1)]
NO_INTEGERS = [1.0, (1, 1.5), None, "11", True, np.float64(1), (1, None), (1, True)]
LAUNCHES: dict[str, tuple[str, list[Any]]] = {
    "a grid of zero, negative or too many blocks": ("grid", _outside(MAX_GRID, 0, -1, (1, 1, 1, 1))),
    "a block of zero, negative or over 1024 threads": ("block", _outside(MAX_BLOCK, 1025, *BLOCKS)),
    "a grid that is no integer": ("grid", NO_INTEGERS),
    "a block that is no integer": ("block", NO_INTEGERS),
    "dynamic shared memory out of range": ("shared", [MAX_SHARED + 1, -1, 2**40, 16.0, None, "16", True]),
}


def _launch_otherwise(field: str, values: list[Any], call: Call) -> Iterator[Attempt]:
    for value in values:
        yield replace(call, **{field: value}), LaunchError, field


Misuse = Callable[[Call], Iterator[Attempt]]
MISUSES: dict[str, Misuse] = {
    kind: functools.partial(_put_instead, arguments, error, wrong)
    for (arguments, error), kinds in INSTEAD.items()
    for kind, wrong in kinds.items()
}
MISUSES |= {kind: functools.partial(_launch_otherwise, *row) for kind, row in LAUNCHES.items()}


def misuse(kind: str) -> Callable[[Misuse], None]:
    """Registers a function that turns a right call into wrong ones."""
    return functools.partial(MISUSES.__setitem__, kind)


@misuse("too few or too many arguments")
def _(call: Call) -> Iterator[Attempt]:
    right = call.arguments
    for arguments in (right[:-1], right[1:], (), *((*right, extra) for extra in (1, None, np.zeros(4, np.float32)))):
        yield replace(call, arguments=arguments), LaunchError, call.kernel.parameters[-1].name


@misuse("float32 for float64")
def _(call: Call) -> Iterator[Attempt]:
    if "float64" in call.kernel.source.elements:
        call = valid_call(call.kernel, FLOAT64)
        for p, a in call.of("arrays"):
            if a.dtype == np.float64:
                yield call.put(p.name, np.ones(a.shape, np.float32)), DTypeError, p.name


@misuse("sizes of which an even number is negative")
def _(call: Call) -> Iterator[Attempt]:
    # The number of elements comes out right: (-4) x (-4) = 16.
    negative = tuple(-a if isinstance(a, int) else a for a in call.arguments)
    first = next(p for p in call.kernel.parameters if p.extent is not None and re.search("[a-z]", p.extent))
    yield replace(call, arguments=negative), ShapeError, first.name


@misuse("a size of zero")
def _(call: Call) -> Iterator[Attempt]:
    used = " ".join(p.extent for p in call.kernel.parameters if p.extent)
    for p, _ in call.of("integers"):
        if re.search(rf"\b{p.name}\b", used):
            yield call.put(p.name, 0), ShapeError, "expected"


@misuse("an output that overlaps another array")
def _(call: Call) -> Iterator[Attempt]:
    for (p, a), (q, b) in itertools.permutations(call.of("arrays"), 2):
        for start in sorted({0, (a.nbytes - 1) // 8 * 8}):  # the same beginning; the last element only
            if not p.const:
                memory = sentinel_array(start + a.nbytes + b.nbytes, np.uint8)
                both = call.put(p.name, memory[: a.nbytes].view(a.dtype))
                both = both.put(q.name, memory[start : start + b.nbytes].view(b.dtype))
                yield both, LaunchError, p.name
                yield both, LaunchError, q.name


@misuse("an output that overlaps the array of a tensor map")
def _(call: Call) -> Iterator[Attempt]:
    for (p, m), (q, b) in itertools.product(call.of("maps"), call.of("arrays")):
        if not q.const and b.nbytes <= m.array.nbytes:
            yield call.put(q.name, m.array.view(np.uint8).reshape(-1)[: b.nbytes].view(b.dtype)), LaunchError, p.name


NO_OUTPUT = "has no output among its arrays: it writes through a table of addresses"
NOT_APPLICABLE = {
    "float64 for float32": "has no array of storage_t or accumulate_t",
    "float32 for float64": "has no array of storage_t, accumulate_t or double, or is for tensor cores",
    "signed for unsigned and back": "has no array of integers",
    "an array at an address that is no multiple of its element size": "has arrays of bytes only",
    **dict.fromkeys(("a read-only output", "an output that overlaps another array"), NO_OUTPUT),
    "a float that becomes infinite": "has no float parameter",
    **{kind: "has no tensor map, or no shape comment of one" for kind in MISUSES if "tensor map" in kind},
}


KINDS = 12  # of misuse of each kernel, at least


class Gate(Part):
    """What the gate looks at is the same on every device, so this needs none: launches are noted, not carried out."""

    name = "gate"
    proves = "a wrong launch is refused with a named error, and nothing runs"
    devices = ("any",)

    def targets(self, rows: Rows) -> Sequence[str]:
        return sorted(shipped_kernels() if rows is ROWS else set().union(*map(kernels_of, rows)))

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        tally.counts["kernels"] += 1
        right = valid_call(find_kernel(work.target))
        kinds = 0
        for kind, misuse in MISUSES.items():
            attempts = list(misuse(right))
            kinds += bool(attempts)
            tally.counts["misuses"] += len(attempts)
            if not attempts and kind not in NOT_APPLICABLE:
                yield f"{kind}: there is no such misuse of this kernel; expected one at least"
            for attempt in attempts:
                yield from (f"{kind}: {problem}" for problem in refusal_problems(right, attempt))
        tally.counts["kinds of misuse"] += kinds
        if kinds < KINDS:
            yield f"{kinds} kinds of misuse; expected {KINDS} at least"

    def ran(self, tally: Tally) -> str:
        kernels = max(tally.counts["kernels"], 1)
        each = tally.counts["kinds of misuse"] / kernels
        return f"{kernels} kernels, {tally.counts['misuses']:,} wrong launches of {each:.1f} kinds on average"


def refusal_problems(right: Call, attempt: Attempt) -> list[str]:
    """What is wrong with the gate's answer to a wrong call."""
    wrong, error, named = attempt
    device, problems = DryDevice(), []
    caught: Exception | None = None
    try:
        wrong.launch(device)
    except Exception as raised:  # a traceback of another kind is a failure, too
        caught = raised
    message = f"{type(caught).__name__}: {caught}" if caught else "no error"
    if type(caught) is not error:
        problems.append(f"{message}; expected {error.__name__}")
    elif not str(caught).startswith(f"{right.kernel.name}: ") or not re.search(rf"\b{named}\b", str(caught)):
        problems.append(f"{message}; expected {right.kernel.name} and {named} to be named")
    if device.launches:
        problems.append("something was launched")
    if any((array.view(np.uint8) != SENTINEL).any() for _, array in right.of("arrays")):
        problems.append("an array was changed")
    return problems
