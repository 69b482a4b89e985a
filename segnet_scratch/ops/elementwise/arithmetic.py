"""Arithmetic on arrays of any shape, with NumPy's broadcasting: what a loss of one's own is made of.

The ops take what one kernel can: operands that are repeated along neighbouring axes, sums over one axis. The functions
at the end take any shapes, in as many ops as that needs.
"""

from math import prod

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.elementwise.add import AddForward
from segnet_scratch.ops.op import ELEMENT_THREADS, Buffers, Op, Spec, expect, expect_array, expect_type, spec_of
from segnet_scratch.runtime.devices import Array, Device

Shape = tuple[int, ...]

# In the order in which cuda/arithmetic.cu numbers them.
BINARY = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide, "power": np.power}
UNARY = {"exp": np.exp, "log": np.log}


class Arithmetic(Op):
    """y = a + b and its like ("add", "subtract", "multiply", "divide", "power"), one of them repeated, or both."""

    name = "arithmetic_forward"

    def __init__(self, a: Spec, b: Spec, operation: str) -> None:
        expect_type(self.name, "a", a.dtype, np.float32, np.float64)
        if b.dtype != a.dtype:
            raise DTypeError(f"{self.name}: b has element type {b.dtype}, expected {a.dtype}, that of a; convert one")
        expect(operation in BINARY, f"{self.name}: operation {operation!r}; expected one of {', '.join(BINARY)}")
        shape = broadcast_shape(a.shape, b.shape)
        expect(prod(shape) > 0, f"{self.name}: y is empty: shape {shape}")
        self.count_a, self.inner_a = self._repeat("a", a, shape)
        self.count_b, self.inner_b = self._repeat("b", b, shape)
        self.operation = operation
        self.inputs = {"a": a, "b": b}
        self.outputs = {"y": a.with_shape(*shape)}
        self.flops = prod(shape)

    def _repeat(self, name: str, s: Spec, shape: Shape) -> tuple[int, int]:
        """How many elements an operand has, and how many of them are repeated at once."""
        runs = _runs(s.shape, shape)
        expect(len(runs) < 2, f"{self.name}: {name} {s.shape} is repeated along axes apart from each other of {shape}")
        return s.size, prod(shape[runs[0][-1] + 1 :]) if runs else 1

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "arithmetic", b, operation=list(BINARY).index(self.operation))

    def reference(self, b: Buffers) -> None:
        BINARY[self.operation](b.a, b.b, out=b.y)


class Elementwise(Op):
    """y = exp x or log x."""

    name = "elementwise_forward"

    def __init__(self, x: Spec, operation: str) -> None:
        expect_array(self.name, "x", x)
        expect(operation in UNARY, f"{self.name}: operation {operation!r}; expected one of {', '.join(UNARY)}")
        self.operation = operation
        self.inputs = {"x": x}
        self.outputs = {"y": x}
        self.flops = x.size

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "elementwise", b, operation=list(UNARY).index(self.operation))

    def reference(self, b: Buffers) -> None:
        UNARY[self.operation](b.x, out=b.y)


class SumForward(Op):
    """y (outer, inner) = sum of x (outer, times, inner) over its middle axis, carried in double."""

    name = "sum_forward"
    FEW = 256  # elements that a thread adds alone
    MAX_CHUNKS = 512

    def __init__(self, x: Spec) -> None:
        outer, times, inner = expect_array(self.name, "x", x, "outer, times, inner")
        self.rows_per_chunk = max(self.FEW, -(-times // self.MAX_CHUNKS))
        self.chunks = -(-times // self.rows_per_chunk)
        self.inputs = {"x": x}
        self.outputs = {"y": x.with_shape(outer, inner)}
        partials = Spec((outer, self.chunks, inner), np.dtype(np.float64))
        self.workspace = {"partials": partials} if self.chunks > 1 else {}
        self.flops = x.size

    def launch(self, device: Device, b: Buffers) -> None:
        if self.chunks == 1:
            self.kernel(device, "sum_few", b)
            return
        outer, _, inner = b.x.shape
        self.kernel(device, "sum_partial", b, (outer * -(-inner // ELEMENT_THREADS), self.chunks))
        self.kernel(device, "sum_merge", b)

    def gradient(self) -> tuple[Op, ...]:
        return (SumBackward.plan(self.outputs["y"], self.inputs["x"].shape[1]),)

    def reference(self, b: Buffers) -> None:
        b.y[...] = b.x.sum(axis=1, dtype=np.float64)


class SumBackward(Op):
    """dx (outer, times, inner) = dy (outer, inner), `times` times."""

    name = "sum_backward"

    def __init__(self, dy: Spec, times: int) -> None:
        outer, inner = expect_array(self.name, "dy", dy, "outer, inner")
        expect(times > 0, f"{self.name}: {times} times; expected at least 1")
        self.inputs = {"dy": dy}
        self.outputs = {"dx": dy.with_shape(outer, times, inner)}
        self.flops = 0

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "repeat", b)

    def reference(self, b: Buffers) -> None:
        b.dx[...] = b.dy[:, None]


def broadcast_shape(a: Shape, b: Shape) -> Shape:
    """The shape that two arrays have together; ShapeError where there is none."""
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        raise ShapeError(f"arithmetic: shapes {a} and {b} do not fit; from the right, sides are equal or 1") from None


def compute(device: Device, operation: str, a: Array, b: Array) -> Array:
    """a + b and its like of any two shapes that fit."""
    if operation == "add" and a.shape == b.shape:
        return AddForward.plan(spec_of(a))(device, a=a, b=b).y
    shape = broadcast_shape(tuple(a.shape), tuple(b.shape))
    a, b = (x if len(_runs(tuple(x.shape), shape)) < 2 else repeat_to(device, x, shape) for x in (a, b))
    return Arithmetic.plan(spec_of(a), spec_of(b), operation)(device, a=a, b=b).y


def repeat_to(device: Device, x: Array, shape: Shape) -> Array:
    """x broadcast to a shape."""
    sides = _padded(tuple(x.shape), shape)
    for run in _runs(tuple(sides), shape):
        flat = x.reshape(-1, prod(sides[run[-1] + 1 :]))
        x = SumBackward.plan(spec_of(flat), prod(shape[k] for k in run))(device, dy=flat).dx
        sides = [shape[k] if k in run else side for k, side in enumerate(sides)]
    return x.reshape(shape)


def sum_to(device: Device, x: Array, shape: Shape) -> Array:
    """The sums of x over the axes along which an array of this shape would be repeated: the opposite of `repeat_to`."""
    full, sides = tuple(x.shape), list(x.shape)
    for run in _runs(shape, full):
        rows = x.reshape(-1, prod(sides[k] for k in run), prod(sides[run[-1] + 1 :]))
        x = SumForward.plan(spec_of(rows))(device, x=rows).y
        sides = [1 if k in run else side for k, side in enumerate(sides)]
    return x if tuple(x.shape) == shape else x.reshape(shape)


def _padded(shape: Shape, full: Shape) -> list[int]:
    return [1] * (len(full) - len(shape)) + list(shape)


def _runs(shape: Shape, full: Shape) -> list[list[int]]:
    """Axes of `full` along which an array of a shape is repeated, those without another between them together."""
    runs: list[list[int]] = []
    apart = True
    for k, (side, whole) in enumerate(zip(_padded(shape, full), full, strict=True)):
        if whole == 1:
            continue
        if side != whole and apart:
            runs.append([])
        if side != whole:
            runs[-1].append(k)
        apart = side == whole
    return runs
