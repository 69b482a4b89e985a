"""Reverse-mode differentiation: Tensor, Function, backward, and the arithmetic of tensors. To be read in one sitting.

A Tensor holds an array of a device. A Function is one application of an operation: `forward` computes an array from
arrays and keeps what `backward` needs; `backward` turns the gradient of the output into the gradient of each input.
`Tensor.backward` walks the graph once, from the loss to the parameters, each Function after all that used its outputs.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.errors import DeviceError, DTypeError, SegnetError, ShapeError
from segnet_scratch.ops.elementwise.arithmetic import Elementwise, compute, repeat_to, sum_to
from segnet_scratch.ops.op import Op, spec_of
from segnet_scratch.runtime.devices import Array, Device, get_device
from segnet_scratch.runtime.observe import current_scope, scope, within
from segnet_scratch.runtime.precision import is_floating

# Of each thread and asyncio task its own: one may predict while another trains.
_recording = ContextVar("recording", default=True)
_keys = itertools.count()  # identify tensors in a backward pass; an id() is used again once its tensor is freed


def no_grad() -> AbstractContextManager[None]:
    """Within this context no graph is recorded, in this thread: for evaluation and prediction."""
    return within(_recording, False)


class Tensor:
    """An array of a device, and its place in the graph of the computation that made it.

    + - * / ** broadcast as NumPy's, with numbers and NumPy arrays on either side; an exponent is a number.
    """

    __array_ufunc__ = None  # a NumPy array to the left leaves the operation to the tensor

    def __init__(self, data: Array, device: Device, requires_grad: bool = False) -> None:
        if not device.owns(data):
            raise DeviceError(
                f"Tensor: got a {type(data).__name__}, which is no array of the {device.name} device; use tensor(...)"
            )
        self.data = data
        self.device = device
        self.requires_grad = requires_grad
        self.grad: Array | None = None
        self.grad_fn: Function | None = None  # the Function whose output this is; None: a leaf
        self.key = next(_keys)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.data.shape)

    @property
    def dtype(self) -> np.dtype:
        """Element type of the array."""
        return np.dtype(self.data.dtype)

    def numpy(self) -> np.ndarray:
        """The contents as a NumPy array; waits for the device."""
        return self.device.download(self.data)

    def item(self) -> float:
        """The only element as a Python number; waits for the device."""
        self._expect_scalar("item()")
        return float(self.numpy().reshape(()))

    def _expect_scalar(self, what: str) -> None:
        if self.data.size != 1:
            raise ShapeError(f"{what} needs a tensor of one element, this one has shape {self.shape}")

    def _expect_gradient(self, gradient: Array) -> None:
        if not self.requires_grad:
            raise SegnetError("backward() from a tensor that depends on nothing that requires a gradient")
        if not self.device.owns(gradient):
            raise DeviceError(f"backward(): the gradient is no array of the {self.device.name} device; upload it")
        if tuple(gradient.shape) != self.shape:
            raise ShapeError(f"backward(): the gradient has shape {tuple(gradient.shape)}, expected {self.shape}")
        if gradient.dtype != self.dtype:
            raise DTypeError(f"backward(): the gradient has element type {gradient.dtype}, expected {self.dtype}")

    def backward(self, gradient: Array | None = None, on_gradient: Callable[[Array], None] | None = None) -> None:
        """Adds d(self)/d(tensor) to `grad` of every leaf that requires it, and frees the graph on the way.

        `gradient` is d(objective)/d(self) where self is not a scalar; its shape is that of self. `on_gradient` gets the
        `grad` of a leaf each time something has been added to it, while backward goes on: of a leaf that the graph uses
        once when it is complete.
        """
        if gradient is None:
            self._expect_scalar("backward() without a gradient")
            gradient = self.device.constant(np.ones(self.shape, self.dtype))
        self._expect_gradient(gradient)
        gradients: dict[int, Array] = {self.key: gradient}
        if self.grad_fn is None:
            _accumulate(self, gradients, on_gradient)
            return
        for function in topological_order(self.grad_fn):
            dy = gradients.pop(function.output_key, None)  # None: no function that used the output has one for it
            with scope(function.scope):
                input_gradients = (None,) * len(function.inputs) if dy is None else function.backward(dy)
            for edge, dx in zip(function.inputs, input_gradients, strict=True):
                if dx is not None and edge.requires_grad:
                    sum_so_far = gradients.get(edge.key)
                    gradients[edge.key] = dx if sum_so_far is None else compute(function.device, "add", sum_so_far, dx)
                if edge.leaf is not None:
                    _accumulate(edge.leaf, gradients, on_gradient)
            function.release()

    def combined(self, other: Any, operation: str) -> "Tensor":
        """Arithmetic with another tensor, a number or an array: "add", "subtract", "multiply", "divide", "power"."""
        return Arithmetic(self.device, operation)(self, self._operand(other))

    def __add__(self, other: Any) -> "Tensor":
        return self.combined(other, "add")

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Tensor":
        return self.combined(other, "subtract")

    def __rsub__(self, other: Any) -> "Tensor":
        return self._operand(other) - self

    def __mul__(self, other: Any) -> "Tensor":
        return self.combined(other, "multiply")

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Tensor":
        return self.combined(other, "divide")

    def __rtruediv__(self, other: Any) -> "Tensor":
        return self._operand(other) / self

    def __neg__(self) -> "Tensor":
        return self * -1

    def __pow__(self, exponent: float) -> "Tensor":
        return self.combined(float(exponent), "power")

    def exp(self) -> "Tensor":
        """e to the power of each element."""
        return Unary(self.device, "exp")(self)

    def log(self) -> "Tensor":
        """The natural logarithm of each element."""
        return Unary(self.device, "log")(self)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> "Tensor":
        """The sum over one axis, several, or all; with `keepdims` they stay, of size 1."""
        return Sum(self.device, *self._without(axis, keepdims))(self)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> "Tensor":
        """The mean over one axis, several, or all; with `keepdims` they stay, of size 1."""
        total = self.sum(axis, keepdims)
        return total / (self.data.size // total.data.size)

    def _operand(self, other: Any) -> "Tensor":
        if isinstance(other, Tensor):
            return other
        if self.device.owns(other) and not isinstance(other, np.ndarray):
            return Tensor(other, self.device)
        return Tensor(self.device.constant(_real(other).astype(self.dtype)), self.device)

    def _without(self, axis: int | tuple[int, ...] | None, keepdims: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape with axes of size 1 in place of those named, and what it is to become."""
        dimensions = len(self.shape)
        named = range(dimensions) if axis is None else (axis,) if isinstance(axis, int) else axis
        if any(not -dimensions <= k < dimensions for k in named) or len({k % dimensions for k in named}) < len(named):
            raise ShapeError(f"sum over axis {axis} of shape {self.shape}: expected different axes of it")
        gone = {k % dimensions for k in named}
        kept = tuple(1 if k in gone else side for k, side in enumerate(self.shape))
        return kept, kept if keepdims else tuple(side for k, side in enumerate(self.shape) if k not in gone)

    def __dlpack__(self, **options: Any) -> Any:
        """The array for another library, shared: `torch.from_dlpack(tensor)`."""
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where the array lies, in DLPack's terms."""
        return self.data.__dlpack_device__()

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, device={self.device.name})"


@dataclass(frozen=True)
class Edge:
    """What backward needs of a Function's input.

    Not its array: a Function saves what it needs, and a result that nobody saves is freed while forward proceeds.
    """

    key: int
    requires_grad: bool
    grad_fn: "Function | None"
    leaf: Tensor | None  # whose `grad` the gradient is added to; None where grad_fn goes on

    @classmethod
    def of(cls, tensor: Tensor) -> "Edge":
        """The edge that leads to a tensor."""
        is_leaf = tensor.grad_fn is None and tensor.requires_grad
        return cls(tensor.key, tensor.requires_grad, tensor.grad_fn, tensor if is_leaf else None)


class Function:
    """One application of a differentiable operation with one output. Subclasses define `forward` and `backward`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.inputs: tuple[Edge, ...] = ()
        self.output_key = -1
        self.scope = current_scope()  # the layer that it belongs to: its backward is observed under the same name
        self.released = False

    def forward(self, *arrays: Array) -> Array:
        """The output from the inputs; keeps on self what backward needs."""
        raise NotImplementedError

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        """One gradient (or None) for each input, from that of the output."""
        raise NotImplementedError

    def release(self) -> None:
        """Forgets inputs and saved arrays, so that memory shrinks while backward proceeds."""
        self.__dict__ = {"device": self.device, "inputs": (), "output_key": -1, "released": True}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Applies the operation and records it where an input requires a gradient."""
        for position, tensor in enumerate(inputs):
            if tensor.device is not self.device:
                raise DeviceError(
                    f"{type(self).__name__}: input {position} is on {tensor.device.name}, expected {self.device.name}; "
                    "create both on one device"
                )
        output = Tensor(self.forward(*(tensor.data for tensor in inputs)), self.device)
        if _recording.get() and any(tensor.requires_grad for tensor in inputs):
            self.inputs, self.output_key = tuple(Edge.of(tensor) for tensor in inputs), output.key
            output.requires_grad, output.grad_fn = True, self
        return output


class Arithmetic(Function):
    """a + b and its like. Backward is arithmetic again, summed over the axes along which an operand was repeated."""

    def __init__(self, device: Device, operation: str) -> None:
        super().__init__(device)
        self.operation = operation

    def forward(self, a: Array, b: Array) -> Array:
        y = compute(self.device, self.operation, a, b)
        self.shapes = tuple(a.shape), tuple(b.shape)
        linear = self.operation in ("add", "subtract")
        self.saved: tuple[Array, ...] = () if linear else (a, b, y) if self.operation == "divide" else (a, b)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        gradients = (self._of_a, self._of_b)
        wanted = [edge.requires_grad for edge in self.inputs]
        of = [gradient(dy) if want else None for gradient, want in zip(gradients, wanted, strict=True)]
        return tuple(d if d is None else sum_to(self.device, d, s) for d, s in zip(of, self.shapes, strict=True))

    def _of_a(self, dy: Array) -> Array:
        if not self.saved:
            return dy
        a, b, *_ = self.saved
        if self.operation == "power":
            one = self.device.constant(np.ones((), b.dtype))
            b = self._do("multiply", b, self._do("power", a, self._do("subtract", b, one)))
        return self._do("divide" if self.operation == "divide" else "multiply", dy, b)

    def _of_b(self, dy: Array) -> Array:
        if self.operation == "add":
            return dy
        if self.operation == "multiply":
            return self._do("multiply", dy, self.saved[0])
        less = self._do("multiply", dy, self.device.constant(np.full((), -1, dy.dtype)))
        if self.operation == "subtract":
            return less
        _, b, y = self.saved
        return self._do("multiply", less, self._do("divide", y, b))

    def _do(self, operation: str, a: Array, b: Array) -> Array:
        return compute(self.device, operation, a, b)


class Unary(Function):
    """exp saves its output, log its input."""

    def __init__(self, device: Device, operation: str) -> None:
        super().__init__(device)
        self.operation = operation

    def forward(self, x: Array) -> Array:
        y = Elementwise.plan(spec_of(x), self.operation)(self.device, x=x).y
        self.saved = y if self.operation == "exp" else x
        return y

    def backward(self, dy: Array) -> tuple[Array]:
        return (compute(self.device, "multiply" if self.operation == "exp" else "divide", dy, self.saved),)


class Sum(Function):
    """The sum over axes: `kept` is the shape in which they are of size 1, `shape` that of the result."""

    def __init__(self, device: Device, kept: tuple[int, ...], shape: tuple[int, ...]) -> None:
        super().__init__(device)
        self.kept, self.shape = kept, shape

    def forward(self, x: Array) -> Array:
        self.x_shape = tuple(x.shape)
        return sum_to(self.device, x, self.kept).reshape(self.shape)

    def backward(self, dy: Array) -> tuple[Array]:
        return (repeat_to(self.device, dy.reshape(self.kept), self.x_shape),)


class OpFunction(Function):
    """An op on tensors; backward runs the ops of its gradient, and what these read is kept for it, nothing else.

    `inputs` are the op's, by name: tensors, and arrays (or None) that have no gradient.
    """

    def __init__(self, device: Device, op: Op, inputs: Mapping[str, Tensor | Array | None]) -> None:
        super().__init__(device)
        self.op, self.gradient = op, op.gradient()
        self.output = next(iter(op.outputs))
        self.tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.saved = {name: value for name, value in inputs.items() if name not in self.tensors}

    def forward(self, *arrays: Array) -> Array:
        inputs = self.saved | dict(zip(self.tensors, arrays, strict=True))
        outputs = vars(self.op(self.device, **inputs))
        read = {name for op in self.gradient for name in op.inputs}
        self.saved = {name: array for name, array in (inputs | outputs).items() if name in read}
        return outputs[self.output]

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        arrays, gradients = self.saved | {f"d{self.output}": dy}, dict[str, Array]()
        wanted = {f"d{name}" for name, edge in zip(self.tensors, self.inputs, strict=True) if edge.requires_grad}
        for op in self.gradient:
            if wanted & op.outputs.keys():
                gradients |= vars(op(self.device, **{name: arrays[name] for name in op.inputs}))
        return tuple(gradients.get(f"d{name}") for name in self.tensors)


def apply(op: Op, **inputs: Tensor | Array | None) -> Tensor:
    """The first output of an op on its inputs by name: tensors, one at least, and arrays that need no gradient."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return OpFunction(tensors[0].device, op, inputs)(*tensors)


def tensor(values: Any, device: "str | Device" = "auto", requires_grad: bool = False) -> Tensor:
    """A Tensor on a device from anything that NumPy or DLPack understands.

    float64 is kept, other real numbers become float32. Arrays of other libraries are shared where that is possible;
    these must be float32 or float64 already. DTypeError for what is no real number.
    """
    device = get_device(device)
    if not isinstance(values, np.ndarray) and not device.owns(values) and hasattr(values, "__dlpack__"):
        values = device.from_dlpack(values)
        if values.dtype not in (np.float32, np.float64):
            raise DTypeError(f"tensor: got an array of {values.dtype}; expected float32 or float64; convert it first")
    if device.owns(values) and not isinstance(values, np.ndarray):
        return Tensor(values, device, requires_grad)
    array = _real(values)
    if array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    return Tensor(device.upload(array), device, requires_grad)


def _real(values: Any) -> np.ndarray:
    """Anything that NumPy understands as an array of real numbers."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"tensor: {error}; expected numbers in rows of one length") from error
    if array.dtype.kind not in "biu" and not is_floating(array.dtype):
        raise DTypeError(f"tensor: got {array.dtype} values; expected real numbers (of complex ones, .real or abs)")
    return array


def topological_order(last: Function) -> Iterator[Function]:
    """`last` and all functions behind it, each after every function that used its output.

    Depth first, without recursion; the functions that are finished first come last.
    """
    finished: list[Function] = []
    seen: set[int] = set()
    stack: list[tuple[Function, bool]] = [(last, False)]
    while stack:
        function, expanded = stack.pop()
        if function.released:
            raise SegnetError("backward() has already gone through this graph and freed it; run forward again")
        if expanded:
            finished.append(function)
        elif id(function) not in seen:
            seen.add(id(function))
            stack.append((function, True))
            stack.extend((edge.grad_fn, False) for edge in function.inputs if edge.grad_fn is not None)
    while finished:
        yield finished.pop()


def _accumulate(leaf: Tensor, gradients: dict[int, Array], on_gradient: Callable[[Array], None] | None) -> None:
    """Adds the gradient that backward has for a leaf, if any, to the leaf's `grad`."""
    gradient = gradients.pop(leaf.key, None)
    if gradient is not None and leaf.requires_grad:
        leaf.grad = gradient if leaf.grad is None else compute(leaf.device, "add", leaf.grad, gradient)
        if on_gradient is not None:
            on_gradient(leaf.grad)
