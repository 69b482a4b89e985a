"""The differentiable functions: for each operation what forward keeps for backward, and backward by the chain rule.

A pair each: the `Function`, whose methods plan and run ops on arrays, and the function on Tensors that users call.
The ops themselves, with their kernels and references, are in `ops/`.
"""

from collections.abc import Sequence
from math import inf

import numpy as np

from segnet_scratch.errors import ShapeError
from segnet_scratch.nn.autograd import Function, Tensor, Unary
from segnet_scratch.ops.convolution.conv2d import (
    Conv2dBackwardBias,
    Conv2dBackwardData,
    Conv2dBackwardWeight,
    Conv2dForward,
    rung_for,
)
from segnet_scratch.ops.convolution.conv_transpose2d import (
    ConvTranspose2dBackwardData,
    ConvTranspose2dBackwardWeight,
    ConvTranspose2dForward,
)
from segnet_scratch.ops.elementwise.dropout import DropoutForward
from segnet_scratch.ops.elementwise.relu import ReluBackward, ReluForward
from segnet_scratch.ops.loss.cross_entropy import (
    NORMALISATIONS,
    REDUCTIONS,
    VOID,
    CrossEntropyBackward,
    CrossEntropyForward,
    check_class_weights,
    check_labels,
    expect_one_of,
)
from segnet_scratch.ops.loss.log_softmax import LogSoftmaxBackward, LogSoftmaxForward
from segnet_scratch.ops.normalisation.batch_norm import (
    EPS,
    MOMENTUM,
    BatchNormBackward,
    BatchNormEvaluationForward,
    BatchNormTrainingForward,
)
from segnet_scratch.ops.op import Op, expect, spec_of
from segnet_scratch.ops.pooling.max_pool import MaxPoolBackward, MaxPoolForward
from segnet_scratch.ops.pooling.max_unpool import MaxUnpoolBackward, MaxUnpoolForward
from segnet_scratch.ops.pooling.windows import PoolCodes
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearBackward, ResizeBilinearForward
from segnet_scratch.runtime.devices import Array, Device


class Conv2d(Function):
    """Saves x and the weight."""

    def __init__(self, device: Device, stride: int, padding: int, rung: str | None, input_gradient: bool) -> None:
        super().__init__(device)
        self.stride, self.padding, self.rung = stride, padding, rung
        self.input_gradient = input_gradient  # the first layer of a network needs none

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.x, self.weight, self.has_bias = x, weight, bias is not None
        specs = spec_of(x), spec_of(weight)
        geometry = Conv2dForward.plan(*specs, self.stride, self.padding, self.rung).geometry
        self.options = (self.stride, self.padding, rung_for(self.device, geometry, x.dtype, self.rung))
        op = Conv2dForward.plan(*specs, *self.options)
        return op(self.device, x=x, weight=weight, bias=bias).y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        specs = spec_of(self.x), spec_of(self.weight)
        dx = None
        if self.input_gradient:
            dx = Conv2dBackwardData.plan(*specs, *self.options)(self.device, dy=dy, weight=self.weight).dx
        dweight = Conv2dBackwardWeight.plan(*specs, *self.options)(self.device, x=self.x, dy=dy).dweight
        if not self.has_bias:
            return dx, dweight
        return dx, dweight, Conv2dBackwardBias.plan(spec_of(dy))(self.device, dy=dy).dbias


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    rung: str | None = None,
) -> Tensor:
    """y (n, oh, ow, o) of x (n, h, w, c), weight (o, kh, kw, c), bias (o); oh = (h + 2 padding - kh) // stride + 1."""
    function = Conv2d(x.device, stride, padding, rung, x.requires_grad)
    return function(x, weight) if bias is None else function(x, weight, bias)


class BatchNorm(Function):
    """Saves x and two numbers a channel; x-hat is computed again in backward."""

    def __init__(
        self, device: Device, running_mean: Array, running_var: Array, training: bool, momentum: float, eps: float
    ) -> None:
        super().__init__(device)
        self.running_mean, self.running_var, self.training = running_mean, running_var, training
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        op: Op
        if self.training:
            op = BatchNormTrainingForward.plan(spec_of(x), self.eps, self.momentum)
        else:
            op = BatchNormEvaluationForward.plan(spec_of(x), self.eps)
        running = {"running_mean": self.running_mean, "running_var": self.running_var}
        out = op(self.device, x=x, weight=weight, bias=bias, **running)
        self.x, self.weight, self.mean, self.inv_std = x, weight, out.mean, out.inv_std
        return out.y

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        saved = {"x": self.x, "mean": self.mean, "inv_std": self.inv_std, "weight": self.weight}
        out = BatchNormBackward.plan(spec_of(dy), self.training)(self.device, dy=dy, **saved)
        return out.dx, out.dweight, out.dbias


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Array,
    running_var: Array,
    training: bool,
    momentum: float = MOMENTUM,
    eps: float = EPS,
) -> Tensor:
    """weight (x - mean) / sqrt(var + eps) + bias for every channel of x (n, h, w, c); the rest is (c).

    In training the statistics are those of x, and the running ones move towards them by `momentum`, in place.
    """
    expect(0 <= eps < inf, f"batch_norm: eps is {eps}; expected a number of at least 0")
    expect(0 <= momentum <= 1, f"batch_norm: momentum is {momentum}; expected 0 to 1")
    return BatchNorm(x.device, running_mean, running_var, training, momentum, eps)(x, weight, bias)


class Relu(Function):
    """Saves the output alone: it says where the input was positive."""

    def forward(self, x: Array) -> Array:
        self.y = ReluForward.plan(spec_of(x))(self.device, x=x).y
        return self.y

    def backward(self, dy: Array) -> tuple[Array]:
        return (ReluBackward.plan(spec_of(dy))(self.device, y=self.y, dy=dy).dx,)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), any shape."""
    return Relu(x.device)(x)


class MaxPool(Function):
    """Saves the codes alone."""

    def forward(self, x: Array) -> Array:
        out = MaxPoolForward.plan(spec_of(x))(self.device, x=x)
        self.codes = PoolCodes(out.codes, (x.shape[1], x.shape[2]))
        return out.y

    def backward(self, dy: Array) -> tuple[Array]:
        op = MaxPoolBackward.plan(spec_of(dy), self.codes.size)
        return (op(self.device, dy=dy, codes=self.codes.codes).dx,)


def max_pool(x: Tensor) -> tuple[Tensor, PoolCodes]:
    """(y, codes) of a map (n, h, w, c); y is (n, ceil(h/2), ceil(w/2), c). Give the codes to `max_unpool`."""
    function = MaxPool(x.device)
    y = function(x)
    return y, function.codes


class MaxUnpool(Function):
    """Saves the codes, which the pool holds already."""

    def __init__(self, device: Device, codes: PoolCodes) -> None:
        super().__init__(device)
        self.codes = codes

    def forward(self, x: Array) -> Array:
        op = MaxUnpoolForward.plan(spec_of(x), spec_of(self.codes.codes), self.codes.size)
        return op(self.device, x=x, codes=self.codes.codes).y

    def backward(self, dy: Array) -> tuple[Array]:
        return (MaxUnpoolBackward.plan(spec_of(dy))(self.device, dy=dy, codes=self.codes.codes).dx,)


def max_unpool(x: Tensor, codes: PoolCodes) -> Tensor:
    """The map (n, h, w, c) of the size that the pool read; ShapeError where the codes are another pool's."""
    return MaxUnpool(x.device, codes)(x)


class CrossEntropy(Function):
    """Saves the logits; the softmax is computed again in backward."""

    def __init__(
        self, device: Device, labels: Array, class_weights: Array | None, normalisation: str, smoothing: float
    ) -> None:
        super().__init__(device)
        self.labels, self.class_weights, self.options = labels, class_weights, (normalisation, smoothing)

    def forward(self, logits: Array) -> Array:
        self.shape = logits.shape
        self.logits = logits.reshape(-1, logits.shape[-1])
        self.labels = self.labels.reshape(-1)
        op = CrossEntropyForward.plan(spec_of(self.logits), *self.options)
        out = op(self.device, logits=self.logits, labels=self.labels, class_weights=self.class_weights)
        self.sums = out.sums
        return out.loss

    def backward(self, dloss: Array) -> tuple[Array]:
        op = CrossEntropyBackward.plan(spec_of(self.logits), *self.options)
        arrays = {"logits": self.logits, "labels": self.labels, "class_weights": self.class_weights}
        out = op(self.device, **arrays, sums=self.sums, dloss=dloss)
        return (out.dlogits.reshape(self.shape),)


def cross_entropy(
    logits: Tensor,
    labels: np.ndarray | Array,
    class_weights: np.ndarray | Sequence[float] | Array | None = None,
    normalisation: str = "weights",
    smoothing: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = VOID,
) -> Tensor:
    """The loss (a tensor of one element) of logits (n, h, w, classes) against labels (n, h, w), integers.

    `reduction` "mean" divides the sum over all pixels as `normalisation` says: "weights", by the sum of their weights,
    or "valid", by their number; "sum" leaves it as it is, and "none" gives a loss (n, h, w) for each pixel, from arrays
    as large as the logits. Pixels labelled `ignore_index` do not count. `class_weights`
    (classes) multiply the loss of each pixel by the weight of its class. `smoothing` is the share of a label that is
    spread over all classes (label smoothing).

    NumPy labels and weights are checked here: DataError for a label that is no class, ConfigError for a weight that is
    negative or not finite. Arrays that are on a GPU already must have been; there void is 255.
    """
    expect(
        len(logits.shape) > 1 and min(logits.shape) > 0,
        f"cross_entropy: logits have shape {logits.shape}; expected (..., classes), no side of them empty",
    )
    device, classes = logits.device, logits.shape[-1]
    expect_one_of("reduction", reduction, REDUCTIONS)
    expect_one_of("normalisation", normalisation, NORMALISATIONS)
    if tuple(labels.shape) != logits.shape[:-1]:
        raise ShapeError(f"cross_entropy: labels {tuple(labels.shape)} do not fit logits {logits.shape}")
    if isinstance(labels, np.ndarray):
        labels = device.upload(check_labels(labels, classes, ignore_index))
    else:
        expect(
            ignore_index == VOID, f"cross_entropy: ignore_index {ignore_index} with labels on the device; pass {VOID}"
        )
    if class_weights is not None and (not device.owns(class_weights) or isinstance(class_weights, np.ndarray)):
        class_weights = device.upload(check_class_weights(class_weights, classes, logits.dtype))
    if reduction == "none":
        return _losses(logits, device.download(labels), class_weights, smoothing)
    divide = "none" if reduction == "sum" else normalisation
    return CrossEntropy(device, labels, class_weights, divide, smoothing)(logits)


def _losses(logits: Tensor, labels: np.ndarray, class_weights: Array | None, smoothing: float) -> Tensor:
    """The loss of every pixel; 0 of void ones. The formulas are those of cuda/cross_entropy.cu."""
    expect(0 <= smoothing < 1, f"cross_entropy: smoothing {smoothing}; expected 0 <= smoothing < 1")
    classes = logits.shape[-1]
    of_class = np.ones(classes) if class_weights is None else logits.device.download(class_weights)
    shares = of_class * ((1 - smoothing) * np.eye(VOID + 1, classes) + smoothing / classes)
    shares[classes:] = 0  # void, and on a GPU any label that is no class
    return -(log_softmax(logits) * shares[labels]).sum(axis=-1)


class LogSoftmax(Function):
    """Saves the output alone."""

    def forward(self, x: Array) -> Array:
        self.y = LogSoftmaxForward.plan(spec_of(x))(self.device, x=x).y
        return self.y

    def backward(self, dy: Array) -> tuple[Array]:
        return (LogSoftmaxBackward.plan(spec_of(dy))(self.device, y=self.y, dy=dy).dx,)


def log_softmax(x: Tensor) -> Tensor:
    """The logarithm of `softmax`, exact where that is nearly 0."""
    return LogSoftmax(x.device)(x)


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum exp(x) over the last axis: probabilities (..., classes) of logits."""
    return log_softmax(x).exp()


class Dropout(Function):
    """Saves nothing but the state: backward makes the same mask again."""

    def __init__(self, device: Device, p: float, layer: int, state: Array) -> None:
        super().__init__(device)
        self.p, self.layer = p, layer
        # The step moves on before backward runs in a loop over several forward passes; keep this one's.
        self.state = device.copy(state)

    def forward(self, x: Array) -> Array:
        return DropoutForward.plan(spec_of(x), self.p, self.layer)(self.device, x=x, state=self.state).y

    def backward(self, dy: Array) -> tuple[Array]:
        return (DropoutForward.plan(spec_of(dy), self.p, self.layer)(self.device, x=dy, state=self.state).y,)


def dropout(x: Tensor, p: float, layer: int, state: Array) -> Tensor:
    """Drops elements of x with probability p and scales the others by 1 / (1 - p).

    `state` is uint64 (2) on the device: seed and step. `layer` tells dropout layers of one network apart.
    """
    return Dropout(x.device, p, layer, state)(x)


class ConvTranspose2d(Function):
    """Saves x and the weight."""

    def __init__(self, device: Device, size: tuple[int, int], rung: str | None) -> None:
        super().__init__(device)
        self.options = size, rung

    def forward(self, x: Array, weight: Array) -> Array:
        self.x, self.weight = x, weight
        size, rung = self.options
        op = ConvTranspose2dForward.plan(spec_of(x), spec_of(weight), size, rung)
        self.options = size, rung_for(self.device, op.conv.geometry, x.dtype, rung)
        op = ConvTranspose2dForward.plan(spec_of(x), spec_of(weight), *self.options)
        return op(self.device, x=x, weight=weight).y

    def backward(self, dy: Array) -> tuple[Array, Array]:
        arguments = spec_of(self.x), spec_of(self.weight), *self.options
        dx = ConvTranspose2dBackwardData.plan(*arguments)(self.device, dy=dy, weight=self.weight).dx
        return dx, ConvTranspose2dBackwardWeight.plan(*arguments)(self.device, x=self.x, dy=dy).dweight


def conv_transpose2d(x: Tensor, weight: Tensor, size: tuple[int, int], rung: str | None = None) -> Tensor:
    """y (n, *size, o) of x (n, ceil(h/2), ceil(w/2), c), weight (c, 4, 4, o), `size` = (h, w); stride 2, padding 1."""
    return ConvTranspose2d(x.device, size, rung)(x, weight)


class ResizeBilinear(Function):
    """Saves sizes alone."""

    def __init__(self, device: Device, size: tuple[int, int]) -> None:
        super().__init__(device)
        self.size = size

    def forward(self, x: Array) -> Array:
        op = ResizeBilinearForward.plan(spec_of(x), self.size)
        self.x_size = x.shape[1], x.shape[2]
        return op(self.device, x=x).y

    def backward(self, dy: Array) -> tuple[Array]:
        return (ResizeBilinearBackward.plan(spec_of(dy), self.x_size)(self.device, dy=dy).dx,)


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The map (n, h, w, c) resized to (n, *size, c)."""
    return ResizeBilinear(x.device, size)(x)


def arithmetic(a: Tensor, b: Tensor | Array, operation: str) -> Tensor:
    """ "add", "subtract", "multiply", "divide" or "power" (b a constant): what the operators of a Tensor call."""
    return a.combined(b, operation)


def elementwise(x: Tensor, operation: str) -> Tensor:
    """ "exp" or "log" of each element."""
    return Unary(x.device, operation)(x)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    return a + b


class Fit(Function):
    """Saves the size alone; the gradient is cut or filled up the other way round."""

    def __init__(self, device: Device, size: tuple[int, int]) -> None:
        super().__init__(device)
        self.size = size

    def forward(self, x: Array) -> Array:
        self.x_size = x.shape[1], x.shape[2]
        return self._fitted(x, self.size)

    def backward(self, dy: Array) -> tuple[Array]:
        return (self._fitted(dy, self.x_size),)

    def _fitted(self, x: Array, size: tuple[int, int]) -> Array:
        n, h, w, c = x.shape
        y = self.device.zeros((n, *size, c), x.dtype)
        h, w = min(h, size[0]), min(w, size[1])
        self.device.write(y[:, :h, :w], x[:, :h, :w])
        return y


def fit(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The map (n, h, w, c) cut to (n, *size, c) at its lower and right edge, or filled up there with 0."""
    expect(len(x.shape) == 4 and min(*x.shape, *size) > 0, f"fit: x {x.shape} to {size}; expected a map and a size")
    return x if x.shape[1:3] == tuple(size) else Fit(x.device, size)(x)
