"""Batch normalisation of (n, h, w, c) over n, h, w (Ioffe and Szegedy, arXiv 1502.03167)."""

from typing import ClassVar

import numpy as np

from segnet_scratch.ops.normalisation import fast
from segnet_scratch.ops.op import Buffers, ColumnsOp, Op, Spec, expect
from segnet_scratch.runtime.devices import Device

EPS = 1e-5
MOMENTUM = 0.1
DOUBLE = np.dtype(np.float64)  # what the kernels carry sums in
AXES = 0, 1, 2


class BatchNormOp(ColumnsOp):
    """What all have in common: x (n, h, w, c), and vectors (c) beside it."""

    flops_each: ClassVar[int]  # of an element of x

    def __init__(self, x: Spec) -> None:
        super().__init__("x", x)
        self.vector = x.with_shape(self.channels)
        self.partials = Spec((self.chunks, 2, self.channels), DOUBLE)
        self.flops = self.flops_each * x.size

    def vectors(self, *names: str) -> dict[str, Spec]:
        """Inputs or outputs, one number per channel."""
        return dict.fromkeys(names, self.vector)


class ForwardOp(BatchNormOp):
    """y, and the statistics that it comes from."""

    def __init__(self, x: Spec, eps: float = EPS, momentum: float = MOMENTUM) -> None:
        super().__init__(x)
        self.eps, self.momentum = eps, momentum
        self.inputs = {"x": x, **self.vectors("weight", "bias", "running_mean", "running_var")}
        self.outputs = {"y": x, **self.vectors("mean", "inv_std")}


def normalised(b: Buffers) -> np.ndarray:
    """By its definition."""
    return (b.x - b.mean) * b.inv_std * b.weight + b.bias


class BatchNormTrainingForward(ForwardOp):
    """y from the batch's own statistics, which are returned and folded into the running ones (in place).

    x (n, h, w, c); weight, bias, running_mean, running_var, mean, inv_std (c). The running variance is unbiased.
    """

    name = "batch_norm_training_forward"
    updates = ("running_mean", "running_var")
    flops_each = 7
    stages: ClassVar = {
        "batch_norm_partial_statistics": "rows",
        "batch_norm_merge_statistics": "channels",
        "batch_norm_forward": "rows",
    }

    def __init__(self, x: Spec, eps: float = EPS, momentum: float = MOMENTUM) -> None:
        super().__init__(x, eps, momentum)
        single = f"batch_norm: x {x.shape} has one value a channel"
        expect(self.rows > 1, f"{single}; training needs n*h*w > 1: use a larger image or batch, or model.eval()")
        self.workspace = {"partials": self.partials}

    def reference(self, b: Buffers) -> None:
        b.mean[...] = b.x.mean(AXES)
        variance = ((b.x - b.mean) ** 2).mean(AXES)
        b.inv_std[...] = 1 / np.sqrt(variance + self.eps)
        b.y[...] = normalised(b)
        self._update_running(b, variance)

    def gradient(self) -> tuple[Op, ...]:
        return (BatchNormBackward.plan(self.inputs["x"], True),)

    def numpy(self, b: Buffers) -> None:
        mean, variance = fast.statistics(b.x)
        b.mean[...], b.inv_std[...] = mean, 1 / np.sqrt(variance + self.eps)
        fast.normalise(b.x, b.mean, b.weight * b.inv_std, b.bias, b.y)
        self._update_running(b, variance.astype(b.mean.dtype))

    def _update_running(self, b: Buffers, variance: np.ndarray) -> None:
        unbiased = variance * (self.rows / (self.rows - 1))
        b.running_mean[...] = (1 - self.momentum) * b.running_mean + self.momentum * b.mean
        b.running_var[...] = (1 - self.momentum) * b.running_var + self.momentum * unbiased


class BatchNormLesson(BatchNormTrainingForward):
    """The same in one launch, by a kernel that teaches and that no layer takes: docs/learn/batch-norm.md.

    `rung` is "thread" or "block": what has a channel to itself.
    """

    def __init__(self, x: Spec, rung: str) -> None:
        super().__init__(x)
        self.rung, self.workspace = rung, {}

    def launch(self, device: Device, b: Buffers) -> None:
        grid, block = {"thread": (-(-self.channels // 32), 32), "block": (self.channels, 256)}[self.rung]
        self.kernel(device, f"{self.name}_{self.rung}", b, grid, block)


class BatchNormEvaluationForward(ForwardOp):
    """y from the running statistics; they come back as mean and inv_std for a backward pass."""

    name = "batch_norm_evaluation_forward"
    flops_each = 3
    stages: ClassVar = {"batch_norm_evaluation_statistics": "channels", "batch_norm_forward": "rows"}

    def gradient(self) -> tuple[Op, ...]:
        return (BatchNormBackward.plan(self.inputs["x"], False),)

    def reference(self, b: Buffers) -> None:
        b.mean[...], b.inv_std[...] = b.running_mean, 1 / np.sqrt(b.running_var + self.eps)
        b.y[...] = normalised(b)

    def numpy(self, b: Buffers) -> None:
        b.mean[...], b.inv_std[...] = b.running_mean, 1 / np.sqrt(b.running_var + self.eps)
        fast.normalise(b.x, b.running_mean, b.weight / np.sqrt(b.running_var + self.eps), b.bias, b.y)


class BatchNormBackward(BatchNormOp):
    """dx, dweight, dbias; `training` says that mean and inv_std came from x itself.

    With x_hat = (x - mean) * inv_std and P = n*h*w: dbias = sum dy and dweight = sum dy * x_hat. Where mean and
    variance depend on x, dx = weight * inv_std * (dy - dbias / P - x_hat * dweight / P).
    """

    name = "batch_norm_backward"
    flops_each = 11
    stages: ClassVar = {
        "batch_norm_backward_partial": "rows",
        "batch_norm_backward_merge": "channels",
        "batch_norm_backward": "rows",
    }

    def __init__(self, x: Spec, training: bool) -> None:
        super().__init__(x)
        self.training = training
        self.inputs = {"x": x, "dy": x, **self.vectors("mean", "inv_std", "weight")}
        self.outputs = {"dx": x, **self.vectors("dweight", "dbias")}
        self.workspace = {"partials": self.partials}

    def reference(self, b: Buffers) -> None:
        xhat = (b.x - b.mean) * b.inv_std
        b.dbias[...], b.dweight[...] = b.dy.sum(AXES), (b.dy * xhat).sum(AXES)
        centred = b.dy - b.dbias / self.rows - xhat * (b.dweight / self.rows) if self.training else b.dy
        b.dx[...] = b.weight * b.inv_std * centred

    def numpy(self, b: Buffers) -> None:
        if not self.training:
            return self.reference(b)
        sums = fast.backward_sums(b.x, b.dy, b.mean, b.inv_std)
        b.dbias[...], b.dweight[...] = sums
        return fast.backward_apply(b.x, b.dy, b.weight, b.mean, b.inv_std, sums / self.rows, b.dx)
