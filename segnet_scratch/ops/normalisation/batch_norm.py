"""Batch normalisation of (n, h, w, c) over n, h, w (Ioffe and Szegedy, arXiv 1502.03167)."""

from typing import Any

import numpy as np

from segnet_scratch.ops.normalisation import fast
from segnet_scratch.ops.op import ELEMENT_THREADS, Buffers, Columns, Op, Spec, expect, expect_map
from segnet_scratch.runtime.devices import Device

EPS = 1e-5
MOMENTUM = 0.1
DOUBLE = np.dtype(np.float64)  # what the kernels carry sums in


def columns_of(op: str, x: Spec) -> Columns:
    n, h, w, c = expect_map(op, "x", x)
    return Columns(n * h * w, c)


class BatchNormTrainingForward(Op):
    """y from the batch's own statistics, which are returned and folded into the running ones (in place).

    x (n, h, w, c); weight, bias, running_mean, running_var, mean, inv_std (c). The running variance is unbiased.
    """

    name = "batch_norm_training_forward"
    updates = ("running_mean", "running_var")

    def __init__(self, x: Spec, eps: float = EPS, momentum: float = MOMENTUM) -> None:
        self.columns = columns_of(self.name, x)
        rows, c = self.columns.rows, self.columns.channels
        expect(
            rows > 1,
            f"batch_norm: x {x.shape} has one value a channel; training needs n*h*w > 1: use a larger image or batch, "
            "or model.eval()",
        )
        vector = x.with_shape(c)
        self.eps, self.momentum = eps, momentum
        self.inputs = {"x": x, "weight": vector, "bias": vector, "running_mean": vector, "running_var": vector}
        self.outputs = {"y": x, "mean": vector, "inv_std": vector}
        self.workspace = {"partials": Spec((self.columns.chunks, 2, c), DOUBLE)}
        self.flops = 7 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        cut: dict[str, Any] = {"rows": g.rows, "rows_per_chunk": g.rows_per_chunk}
        self.kernel(device, "batch_norm_partial_statistics", b, g.grid, g.block, **cut)
        self.kernel(device, "batch_norm_merge_statistics", b, g.merge_grid, **cut)
        self.kernel(device, "batch_norm_forward", b, g.grid, g.block, **cut)

    def reference(self, b: Buffers) -> None:
        axes = (0, 1, 2)
        b.mean[...] = b.x.mean(axes)
        variance = ((b.x - b.mean) ** 2).mean(axes)
        b.inv_std[...] = 1 / np.sqrt(variance + self.eps)
        b.y[...] = (b.x - b.mean) * b.inv_std * b.weight + b.bias
        self._update_running(b, variance)

    def gradient(self) -> tuple[Op, ...]:
        return (BatchNormBackward.plan(self.inputs["x"], True),)

    def numpy(self, b: Buffers) -> None:
        variance = np.empty_like(b.mean)
        fast.training_forward(b.x, b.weight, b.bias, b.y, b.mean, b.inv_std, variance, self.eps)
        self._update_running(b, variance)

    def _update_running(self, b: Buffers, variance: np.ndarray) -> None:
        unbiased = variance * (self.columns.rows / (self.columns.rows - 1))
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
        c = self.columns.channels
        grid, block = {"thread": (-(-c // 32), 32), "block": (c, 256)}[self.rung]
        self.kernel(device, f"{self.name}_{self.rung}", b, grid, block)


class BatchNormEvaluationForward(Op):
    """y from the running statistics; they come back as mean and inv_std for a backward pass."""

    name = "batch_norm_evaluation_forward"

    def __init__(self, x: Spec, eps: float = EPS) -> None:
        self.columns = columns_of(self.name, x)
        vector = x.with_shape(self.columns.channels)
        self.eps = eps
        self.inputs = {"x": x, "weight": vector, "bias": vector, "running_mean": vector, "running_var": vector}
        self.outputs = {"y": x, "mean": vector, "inv_std": vector}
        self.flops = 3 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        self.kernel(device, "batch_norm_evaluation_statistics", b, g.merge_grid)
        self.kernel(device, "batch_norm_forward", b, g.grid, g.block, rows_per_chunk=g.rows_per_chunk)

    def gradient(self) -> tuple[Op, ...]:
        return (BatchNormBackward.plan(self.inputs["x"], False),)

    def reference(self, b: Buffers) -> None:
        b.mean[...] = b.running_mean
        b.inv_std[...] = 1 / np.sqrt(b.running_var + self.eps)
        b.y[...] = (b.x - b.mean) * b.inv_std * b.weight + b.bias

    def numpy(self, b: Buffers) -> None:
        b.mean[...] = b.running_mean
        b.inv_std[...] = 1 / np.sqrt(b.running_var + self.eps)
        fast.evaluation_forward(b.x, b.weight, b.bias, b.running_mean, b.running_var, b.y, self.eps)


class BatchNormBackward(Op):
    """dx, dweight, dbias; `training` says that mean and inv_std came from x itself."""

    name = "batch_norm_backward"

    def __init__(self, x: Spec, training: bool) -> None:
        self.columns = columns_of(self.name, x)
        self.training = training
        vector = x.with_shape(self.columns.channels)
        self.inputs = {"x": x, "dy": x, "mean": vector, "inv_std": vector, "weight": vector}
        self.outputs = {"dx": x, "dweight": vector, "dbias": vector}
        self.workspace = {"partials": Spec((self.columns.chunks, 2, self.columns.channels), DOUBLE)}
        self.flops = 11 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        for name, grid, block in (
            ("batch_norm_backward_partial", g.grid, g.block),
            ("batch_norm_backward_merge", g.merge_grid, ELEMENT_THREADS),
            ("batch_norm_backward", g.grid, g.block),
        ):
            self.kernel(device, name, b, grid, block, rows_per_chunk=g.rows_per_chunk)

    def reference(self, b: Buffers) -> None:
        axes = (0, 1, 2)
        xhat = (b.x - b.mean) * b.inv_std
        b.dbias[...] = b.dy.sum(axes)
        b.dweight[...] = (b.dy * xhat).sum(axes)
        if self.training:
            centred = b.dy - b.dbias / self.columns.rows - xhat * (b.dweight / self.columns.rows)
            b.dx[...] = b.weight * b.inv_std * centred
        else:
            b.dx[...] = b.weight * b.inv_std * b.dy

    def numpy(self, b: Buffers) -> None:
        if self.training:
            fast.backward(b.x, b.dy, b.weight, b.mean, b.inv_std, b.dx, b.dweight, b.dbias)
        else:
            self.reference(b)
