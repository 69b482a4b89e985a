"""An op with every shape fixed: planned without touching data, run on any device.

`plan` (the constructor) checks shapes and derives everything that follows from them: outputs, workspace, FLOPs and
bytes. `run` does the work on buffers that somebody has allocated, launching kernels or computing with NumPy; it never
waits for the device. Calling an op allocates its outputs and workspace, then runs it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.launch import ElementTypes, Kernel, find_kernel, launch
from segnet_scratch.runtime.observe import carry_out
from segnet_scratch.runtime.precision import BFLOAT16

VOID = 255
"""The label of pixels that belong to no class: object borders in VOC, padding in training crops."""

Buffers = SimpleNamespace  # the arrays of one run, under the names that the plan gives them


@dataclass(frozen=True)
class Spec:
    """Shape and element type of an array that need not exist yet."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize

    def with_shape(self, *shape: int) -> "Spec":
        """The same element type in another shape."""
        return Spec(shape, self.dtype)


def spec(shape: Sequence[int], dtype: DTypeLike = np.float32) -> Spec:
    """A Spec from any shape and dtype."""
    return Spec(tuple(int(n) for n in shape), np.dtype(dtype))


def spec_of(array: Array) -> Spec:
    """The Spec of an existing array."""
    return Spec(tuple(array.shape), np.dtype(array.dtype))


ELEMENT_THREADS = 256


def element_grid(count: int, each: int = 1) -> int:
    """Blocks of ELEMENT_THREADS for a grid-stride loop over `count` elements; a thread takes `each` at a time."""
    return max(1, min(-(-count // (ELEMENT_THREADS * each)), 1 << 16))


class Op:
    """One operation on arrays of fixed shapes. Subclasses fill in the plan in `__init__` and say how it is computed."""

    name: ClassVar[str]  # "max_pool_forward": op and direction
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    workspace: Mapping[str, Spec] = MappingProxyType({})
    updates: tuple[str, ...] = ()  # inputs that are changed in place
    optional: ClassVar[tuple[str, ...]] = ()  # inputs that may be None
    flops = 0
    over: ClassVar[str] = ""  # the array that has a thread for each of its elements; the first output unless named
    each: ClassVar[int] = 1  # how many of these elements a thread takes at a time

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def plan(cls, *arguments: Any, **options: Any) -> Self:
        """The op for these shapes and options; planned once."""
        return cls(*arguments, **options)

    @property
    def types(self) -> ElementTypes:
        """Storage and accumulation types of the kernels: those of the first input."""
        return ElementTypes.of(next(iter(self.inputs.values())).dtype)

    @property
    def bytes(self) -> int:
        """Bytes that must cross the memory bus at least once: every input read, every output and update written."""
        updated = (self.inputs[name] for name in self.updates)
        return sum(s.nbytes for s in (*self.inputs.values(), *self.outputs.values(), *updated))

    def launch(self, device: Device, b: Buffers) -> None:
        """Launches the kernels: unless written out, the one that has the op's name."""
        self.kernel(device, self.name, b)

    def reference(self, b: Buffers) -> None:
        """Computes with plain NumPy: the definition, obviously right, slow. Independent of the kernels."""
        raise NotImplementedError

    def numpy(self, b: Buffers) -> None:
        """Computes with the fast NumPy of the family (`fast.py`) where there is one; never with maps of bfloat16."""
        self.reference(b)

    def gradient(self) -> "tuple[Op, ...]":
        """The ops that compute its gradients, planned; () where there are none.

        Arrays are matched by name. Inputs of these ops are this op's inputs and outputs, and `dy`, the gradient of its
        first output `y`; their output `dx` is the gradient of its input `x`.
        """
        return ()

    def run(self, device: Device, b: Buffers) -> None:
        """Computes the outputs in buffers that are allocated: by kernels, or with NumPy on the numpy device."""
        if device.runs_kernels:
            self.launch(device, b)
            return
        with np.errstate(all="ignore"):  # as the kernels: 1 / 0 is infinity
            if next(iter(self.inputs.values())).dtype == BFLOAT16:
                self._in_float32(b)
            else:
                self.numpy(b)

    def _in_float32(self, b: Buffers) -> None:
        """Computes with float32 in place of bfloat16, and rounds the outputs (and inputs that are updated)."""
        given = vars(b).items()
        wide = {k: a.astype(np.float32) if a is not None and a.dtype == BFLOAT16 else a for k, a in given}
        self.numpy(Buffers(**wide))
        for name in (*self.outputs, *self.updates):
            if wide[name] is not (target := getattr(b, name)):
                target[...] = wide[name]

    def kernel(
        self,
        device: Device,
        name: str,
        b: Buffers,
        grid: Any = None,
        block: Any = ELEMENT_THREADS,
        *,
        types: ElementTypes | None = None,
        shared: int = 0,
        **given: Any,
    ) -> None:
        """Launches one kernel, through the gate: for this op's element types and the elements of `over`, unless told.

        Arguments go by the names of the kernel's parameters: they are `given`, or lie in `b`, or are attributes of the
        op, or follow from the shapes of arrays by the shape comments of the signature. A missing array is None.
        """
        kernel = find_kernel(name)
        if name not in self._numbers:
            self._numbers[name] = self._numbers_of(kernel, vars(b) | given)
        values = self._numbers[name] | given
        arguments = [values[p.name] if p.name in values else getattr(b, p.name, None) for p in kernel.parameters]
        if grid is None:
            grid = element_grid(getattr(b, self.over or next(iter(self.outputs))).size, self.each)
        launch(device, kernel, grid, block, arguments, types or self.types, shared)

    @functools.cached_property
    def _numbers(self) -> dict[str, dict[str, Any]]:
        """By kernel: its scalar arguments that follow from attributes and shapes, which the plan has fixed."""
        return {}

    def _numbers_of(self, kernel: Kernel, arrays: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for p in kernel.parameters:
            own, array = getattr(self, p.name, None), arrays.get(p.name)
            if p.scalar and isinstance(own, int | float):
                found[p.name] = int(own) if isinstance(own, bool) else own
            elif not p.scalar and array is not None:
                found = p.sizes(tuple((array.array if p.tensor_map else array).shape)) | found
        return found

    def __call__(self, device: Device, **arrays: Array | None) -> Buffers:
        """Checks the inputs against the plan, allocates outputs and workspace, runs; returns the outputs."""
        self.check(arrays)
        outputs = {name: device.empty(s.shape, s.dtype) for name, s in self.outputs.items()}
        # The numpy device works in cache-sized pieces of its own.
        needed = self.workspace if device.runs_kernels else {}
        workspace = {name: device.empty(s.shape, s.dtype) for name, s in needed.items()}
        buffers = Buffers(**arrays, **outputs, **workspace)
        carry_out(self, lambda: self.run(device, buffers))
        return Buffers(**outputs)

    def check(self, arrays: Mapping[str, Array | None]) -> None:
        """ShapeError, DTypeError unless these are the inputs as planned."""
        if arrays.keys() != self.inputs.keys():
            raise ShapeError(f"{self.name}: takes {', '.join(self.inputs)}; got {', '.join(arrays)}")
        for name, expected in self.inputs.items():
            array = arrays[name]
            if array is None and name in self.optional:
                continue
            what = f"{self.name}: {name}"
            if array is None:
                raise ShapeError(f"{what} is None; expected an array of shape {expected.shape}")
            if tuple(array.shape) != expected.shape:
                raise ShapeError(f"{what} has shape {tuple(array.shape)}, expected {expected.shape}")
            if array.dtype != expected.dtype:
                raise DTypeError(f"{what} has element type {array.dtype}, expected {expected.dtype}")
            if not array.flags.c_contiguous:
                view = f"{what} is a view with strides {array.strides} of shape {expected.shape}"
                raise ShapeError(f"{view}; expected a C-contiguous array; copy it")


def expect(condition: bool, message: str) -> None:
    """ShapeError with this message unless the condition holds."""
    if not condition:
        raise ShapeError(message)


def expect_array(op: str, name: str, s: Spec, sides: str = "", bfloat16: bool = False) -> tuple[int, ...]:
    """The shape of an array, checked: its sides ("outer, inner"; "..., classes": one at least), none empty, its type.

    That is float32 or float64, or bfloat16 where such arrays are taken.
    """
    names = sides.split(", ")
    fits = not sides or len(s.shape) == len(names) or (names[0] == "..." and len(s.shape) > 0)
    expect(fits, f"{op}: {name} has shape {s.shape}; expected ({sides}){', channels last' * (len(names) == 4)}")
    expect(s.size > 0, f"{op}: {name} is empty: shape {s.shape}")
    expect_type(op, name, s.dtype, np.float32, BFLOAT16 if bfloat16 else np.float64, np.float64)
    return s.shape


def expect_map(op: str, name: str, s: Spec, bfloat16: bool = False) -> tuple[int, int, int, int]:
    """(n, h, w, c) of an activation map, checked."""
    n, h, w, c = expect_array(op, name, s, "n, h, w, c", bfloat16)
    return n, h, w, c


def expect_type(op: str, name: str, dtype: np.dtype, *taken: DTypeLike) -> None:
    """DTypeError unless the element type is one of those that are taken; the first two of them are named."""
    if dtype not in taken:
        first, second = (np.dtype(kind) for kind in taken[:2])
        raise DTypeError(f"{op}: {name} has element type {dtype}; expected {first} or {second}; convert it")


class ColumnsOp(Op):
    """Sums over the columns of a map seen as a matrix (rows, channels), chunk by chunk of rows: common/columns.cuh.

    Chunks depend on the shape alone, so that the sums have the same bits on every GPU.
    """

    LANES, ROWS, MAX_CHUNKS = 32, 8, 512  # the first two: COLUMN_LANES, ROW_LANES
    # The kernels, in order: over groups of channels and chunks of "rows", or a thread for each of the "channels".
    stages: ClassVar[dict[str, str]]

    def __init__(self, name: str, map_: Spec, bfloat16: bool = False) -> None:
        n, h, w, self.channels = expect_map(self.name, name, map_, bfloat16)
        self.rows = n * h * w
        self.rows_per_chunk = max(64, -(-self.rows // self.MAX_CHUNKS))  # at least as many rows as are worth a block
        self.chunks = -(-self.rows // self.rows_per_chunk)

    def launch(self, device: Device, b: Buffers) -> None:
        of_rows: tuple[Any, Any] = (-(-self.channels // self.LANES), self.chunks), (self.LANES, self.ROWS)
        of_channels: tuple[Any, Any] = element_grid(self.channels), ELEMENT_THREADS
        for name, over in self.stages.items():
            self.kernel(device, name, b, *(of_rows if over == "rows" else of_channels))
