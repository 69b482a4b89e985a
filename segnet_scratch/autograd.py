"""Reverse-mode differentiation: Tensor, Function, backward. To be read in one sitting.

A Tensor holds an array of a device. A Function is one application of an operation: `forward` computes arrays from
arrays and keeps what `backward` needs; `backward` turns the gradient of each output into the gradient of each input.
`Tensor.backward` walks the graph once, from the loss to the parameters, each Function after all that used its outputs.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from segnet_scratch.device import Array, Device, get_device
from segnet_scratch.errors import DeviceError, SegnetError, ShapeError

_recording = True
_keys = itertools.count()  # names tensors in a backward pass; an id() may be used again when a tensor has gone


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Within this context no graph is recorded: for evaluation and prediction."""
    global _recording
    previous, _recording = _recording, False
    try:
        yield
    finally:
        _recording = previous


class Tensor:
    """An array of a device, and its place in the graph of the computation that made it."""

    def __init__(self, data: Array, device: Device, requires_grad: bool = False) -> None:
        if not device.owns(data):
            raise DeviceError(
                f"Tensor: got a {type(data).__name__}, which is no array of the {device.name} device; use tensor(...)"
            )
        self.data = data
        self.device = device
        self.requires_grad = requires_grad
        self.grad: Array | None = None
        self.maker: Function | None = None  # the Function whose output this is
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

    def backward(self, gradient: Array | None = None) -> None:
        """Adds d(self)/d(tensor) to `grad` of every leaf that requires it, then frees the graph.

        `gradient` is d(objective)/d(self) where self is not a scalar; its shape is that of self.
        """
        if gradient is None:
            self._expect_scalar("backward() without a gradient")
            gradient = self.device.upload(np.ones(self.shape, self.dtype))
        gradients: dict[int, Array] = {self.key: gradient}
        if self.maker is None:
            _give(self, gradients)
            return
        for function in _from_loss_to_leaves(self.maker):
            given = [gradients.pop(key, None) for key in function.output_keys]
            if any(g is not None for g in given):
                for tensor, d in zip(function.inputs, function.backward(*given), strict=True):
                    if d is not None and tensor.requires_grad:
                        held = gradients.get(tensor.key)
                        gradients[tensor.key] = d if held is None else _sum(tensor.device, held, d)
                for tensor in function.inputs:
                    if tensor.maker is None:
                        _give(tensor, gradients)
            function.release()

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, device={self.device.name})"


class Function:
    """One application of a differentiable operation. Subclasses define `forward` and `backward`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.inputs: tuple[Tensor, ...] = ()
        self.output_keys: tuple[int, ...] = ()
        self.released = False

    def forward(self, *arrays: Array) -> Any:
        """The output array, or a tuple of them, from the input arrays; keeps on self what backward needs."""
        raise NotImplementedError

    def backward(self, *gradients: Array | None) -> tuple[Array | None, ...]:
        """One gradient (or None) for each input, from one (or None) for each output."""
        raise NotImplementedError

    def release(self) -> None:
        """Forgets inputs and saved arrays, so that memory shrinks while backward proceeds."""
        self.__dict__ = {"device": self.device, "inputs": (), "output_keys": (), "released": True}

    def __call__(self, *inputs: Tensor) -> Any:
        """Applies the operation and records it where an input requires a gradient."""
        outputs = self.forward(*(tensor.data for tensor in inputs))
        several = isinstance(outputs, tuple)
        tensors = [Tensor(array, self.device) for array in (outputs if several else (outputs,))]
        if _recording and any(tensor.requires_grad for tensor in inputs):
            self.inputs = inputs
            self.output_keys = tuple(tensor.key for tensor in tensors)
            for tensor in tensors:
                tensor.requires_grad = True
                tensor.maker = self
        return tuple(tensors) if several else tensors[0]


def apply(function: Function, *inputs: Tensor) -> Any:
    """Applies a function after checking that all inputs live on its device."""
    for position, tensor in enumerate(inputs):
        if tensor.device is not function.device:
            raise DeviceError(
                f"{type(function).__name__}: input {position} is on {tensor.device.name}, expected "
                f"{function.device.name}; create both on one device"
            )
    return function(*inputs)


def tensor(values: Any, device: "str | Device" = "auto", requires_grad: bool = False) -> Tensor:
    """A Tensor on a device from anything NumPy understands; float64 is kept, other numbers become float32."""
    chosen = get_device(device)
    if chosen.owns(values):
        return Tensor(values, chosen, requires_grad)
    array = np.asarray(values)
    if array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    return Tensor(chosen.upload(array), chosen, requires_grad)


def _from_loss_to_leaves(last: Function) -> Iterator[Function]:
    """All functions behind `last`, each after every function that uses its outputs (depth-first, without recursion)."""
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
            stack.extend((t.maker, False) for t in function.inputs if t.maker is not None)
    while finished:
        yield finished.pop()


def _give(leaf: Tensor, gradients: dict[int, Array]) -> None:
    """Adds a finished gradient to a leaf."""
    gradient = gradients.pop(leaf.key, None)
    if gradient is not None and leaf.requires_grad:
        leaf.grad = gradient if leaf.grad is None else _sum(leaf.device, leaf.grad, gradient)


def _sum(device: Device, a: Array, b: Array) -> Array:
    from segnet_scratch.ops.add import AddForward  # ops build on this module
    from segnet_scratch.ops.op import spec_of

    return AddForward.plan(spec_of(a))(device, a=a, b=b).y
