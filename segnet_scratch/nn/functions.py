"""The differentiable functions on Tensors that users call.

The ops themselves, with their kernels and references, are in `ops/`; an op knows the ops that give its gradients.
"""

from collections.abc import Sequence
from math import inf

import numpy as np

from segnet_scratch.errors import ShapeError
from segnet_scratch.nn.autograd import Function, OpFunction, Tensor, Unary, apply
from segnet_scratch.ops.convolution.conv2d import Conv2dForward, rung_for
from segnet_scratch.ops.convolution.conv_transpose2d import ConvTranspose2dForward
from segnet_scratch.ops.elementwise.dropout import DropoutForward
from segnet_scratch.ops.elementwise.relu import ReluForward
from segnet_scratch.ops.loss import cross_entropy as cross_entropy_ops
from segnet_scratch.ops.loss.log_softmax import LogSoftmaxForward
from segnet_scratch.ops.normalisation import batch_norm_ranks
from segnet_scratch.ops.normalisation.batch_norm import (
    EPS,
    MOMENTUM,
    BatchNormEvaluationForward,
    BatchNormTrainingForward,
)
from segnet_scratch.ops.op import VOID, Op, Spec, expect, spec_of
from segnet_scratch.ops.pooling.max_pool import MaxPoolForward
from segnet_scratch.ops.pooling.max_unpool import MaxUnpoolForward
from segnet_scratch.ops.pooling.windows import PoolCodes
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearForward
from segnet_scratch.parallel import ALONE, Communicator
from segnet_scratch.runtime.devices import Array, Device


def _spec(x: Tensor) -> Spec:
    return spec_of(x.data)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, rung: str | None = None
) -> Tensor:
    """y (n, oh, ow, o) of x (n, h, w, c), weight (o, kh, kw, c), bias (o); oh = (h + 2 padding - kh) // stride + 1."""
    options = _spec(x), _spec(weight), stride, padding
    geometry = Conv2dForward.plan(*options, rung).geometry
    op = Conv2dForward.plan(*options, rung_for(x.device, geometry, x.dtype, rung))
    return apply(op, x=x, weight=weight, bias=bias)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Array,
    running_var: Array,
    training: bool,
    momentum: float = MOMENTUM,
    eps: float = EPS,
    ranks: Communicator = ALONE,
) -> Tensor:
    """weight (x - mean) / sqrt(var + eps) + bias for every channel of x (n, h, w, c); the rest is (c).

    In training the statistics are those of x, or of the x of all `ranks` together, and the running ones move towards
    them by `momentum`, in place.
    """
    expect(0 <= eps < inf, f"batch_norm: eps is {eps}; expected a number of at least 0")
    expect(0 <= momentum <= 1, f"batch_norm: momentum is {momentum}; expected 0 to 1")
    if training and ranks.size > 1:
        running = {"running_mean": running_mean, "running_var": running_var}
        return SyncBatchNorm(x.device, ranks, running, eps, momentum)(x, weight, bias)
    op: Op = BatchNormEvaluationForward.plan(_spec(x), eps)
    if training:
        op = BatchNormTrainingForward.plan(_spec(x), eps, momentum)
    return apply(op, x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)


class SyncBatchNorm(Function):
    """Batch norm in training over the x of several ranks. Saves x, two numbers per channel and the moments of all."""

    def __init__(self, device: Device, ranks: Communicator, running: dict[str, Array], *options: float) -> None:
        super().__init__(device)
        self.ranks, self.running, self.options = ranks, running, options

    def forward(self, x: Array, weight: Array, bias: Array) -> Array:
        own = batch_norm_ranks.BatchNormMoments.plan(spec_of(x))(self.device, x=x).moments
        moments = self.ranks.collectives.all_gather(self.device, own)
        op = batch_norm_ranks.BatchNormRanksForward.plan(spec_of(x), self.ranks.size, *self.options)
        out = op(self.device, x=x, moments=moments, weight=weight, bias=bias, **self.running)
        self.saved = {"x": x, "mean": out.mean, "inv_std": out.inv_std}
        self.merged = {"weight": weight, "moments": moments}
        return out.y

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        own = batch_norm_ranks.BatchNormBackwardSums.plan(spec_of(dy))(self.device, dy=dy, **self.saved)
        sums = self.ranks.collectives.all_gather(self.device, own.sums)
        op = batch_norm_ranks.BatchNormRanksBackward.plan(spec_of(dy), self.ranks.size)
        return op(self.device, dy=dy, sums=sums, **self.saved, **self.merged).dx, own.dweight, own.dbias


def relu(x: Tensor) -> Tensor:
    """max(x, 0), any shape."""
    return apply(ReluForward.plan(_spec(x)), x=x)


def max_pool(x: Tensor) -> tuple[Tensor, PoolCodes]:
    """(y, codes) of a map (n, h, w, c); y is (n, ceil(h/2), ceil(w/2), c). Give the codes to `max_unpool`."""
    function = OpFunction(x.device, MaxPoolForward.plan(_spec(x)), {"x": x})
    y = function(x)
    return y, PoolCodes(function.saved["codes"], (x.shape[1], x.shape[2]))


def max_unpool(x: Tensor, codes: PoolCodes) -> Tensor:
    """The map (n, h, w, c) of the size that the pool read; ShapeError where the codes are another pool's."""
    return apply(MaxUnpoolForward.plan(_spec(x), spec_of(codes.codes), codes.size), x=x, codes=codes.codes)


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
    cross_entropy_ops.expect_one_of("reduction", reduction, cross_entropy_ops.REDUCTIONS)
    cross_entropy_ops.expect_one_of("normalisation", normalisation, cross_entropy_ops.NORMALISATIONS)
    if tuple(labels.shape) != logits.shape[:-1]:
        raise ShapeError(f"cross_entropy: labels {tuple(labels.shape)} do not fit logits {logits.shape}")
    if isinstance(labels, np.ndarray):
        labels = device.upload(cross_entropy_ops.check_labels(labels, classes, ignore_index))
    else:
        expect(
            ignore_index == VOID, f"cross_entropy: ignore_index {ignore_index} with labels on the device; pass {VOID}"
        )
    if class_weights is not None and (not device.owns(class_weights) or isinstance(class_weights, np.ndarray)):
        class_weights = device.upload(cross_entropy_ops.check_class_weights(class_weights, classes, logits.dtype))
    if reduction == "none":
        return _losses(logits, device.download(labels), class_weights, smoothing)
    divide = "none" if reduction == "sum" else normalisation
    op = cross_entropy_ops.CrossEntropyForward.plan(_spec(logits), divide, smoothing)
    return apply(op, logits=logits, labels=labels, class_weights=class_weights)


def _losses(logits: Tensor, labels: np.ndarray, class_weights: Array | None, smoothing: float) -> Tensor:
    """The loss of every pixel; 0 of void ones. The formulas are those of cuda/cross_entropy.cu."""
    expect(0 <= smoothing < 1, f"cross_entropy: smoothing {smoothing}; expected 0 <= smoothing < 1")
    classes = logits.shape[-1]
    of_class = np.ones(classes) if class_weights is None else logits.device.download(class_weights)
    shares = of_class * ((1 - smoothing) * np.eye(VOID + 1, classes) + smoothing / classes)
    shares[classes:] = 0  # void, and on a GPU any label that is no class
    return -(log_softmax(logits) * shares[labels]).sum(axis=-1)


def log_softmax(x: Tensor) -> Tensor:
    """The logarithm of `softmax`, exact where that is nearly 0."""
    return apply(LogSoftmaxForward.plan(_spec(x)), x=x)


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


def conv_transpose2d(x: Tensor, weight: Tensor, size: tuple[int, int], rung: str | None = None) -> Tensor:
    """y (n, *size, o) of x (n, ceil(h/2), ceil(w/2), c), weight (c, 4, 4, o), `size` = (h, w); stride 2, padding 1."""
    options = _spec(x), _spec(weight), size
    geometry = ConvTranspose2dForward.plan(*options, rung).conv.geometry
    op = ConvTranspose2dForward.plan(*options, rung_for(x.device, geometry, x.dtype, rung))
    return apply(op, x=x, weight=weight)


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The map (n, h, w, c) resized to (n, *size, c)."""
    return apply(ResizeBilinearForward.plan(_spec(x), size), x=x)


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
