"""Batch norm over a batch that several ranks share: each sends the others its moments, and its sums of backward.

    moments of x -> those of all ranks -> y                 (in training; evaluation asks nobody)
    sums of dy   -> those of all ranks -> dx

Between the two halves a communicator gathers; every rank merges in the order of the ranks, and has the same bits.
"""

from typing import Any

import numpy as np

from segnet_scratch.ops.normalisation import fast
from segnet_scratch.ops.normalisation.batch_norm import DOUBLE, EPS, MOMENTUM, columns_of
from segnet_scratch.ops.op import Buffers, Op, Spec
from segnet_scratch.runtime.devices import Device


class BatchNormMoments(Op):
    """moments (3, c), float64: the rows of x (n, h, w, c), the mean of each channel, its squared distances from it."""

    name = "batch_norm_moments"

    def __init__(self, x: Spec) -> None:
        self.columns = columns_of(self.name, x)
        self.inputs = {"x": x}
        self.outputs = {"moments": Spec((3, self.columns.channels), DOUBLE)}
        self.workspace = {"partials": Spec((self.columns.chunks, 2, self.columns.channels), DOUBLE)}
        self.flops = 4 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        cut: dict[str, Any] = {"rows": g.rows, "rows_per_chunk": g.rows_per_chunk}
        self.kernel(device, "batch_norm_partial_statistics", b, g.grid, g.block, **cut)
        self.kernel(device, self.name, b, g.merge_grid, **cut)

    def reference(self, b: Buffers) -> None:
        axes, x = (0, 1, 2), b.x.astype(np.float64)
        b.moments[0] = self.columns.rows
        b.moments[1:] = x.mean(axes), ((x - x.mean(axes)) ** 2).sum(axes)

    def numpy(self, b: Buffers) -> None:
        mean, variance = fast.statistics(b.x)
        b.moments[0] = self.columns.rows
        b.moments[1:] = mean, variance * self.columns.rows


class BatchNormRanksForward(Op):
    """As BatchNormTrainingForward, from the moments (ranks, 3, c) of all ranks."""

    name = "batch_norm_ranks_forward"
    updates = ("running_mean", "running_var")

    def __init__(self, x: Spec, ranks: int, eps: float = EPS, momentum: float = MOMENTUM) -> None:
        self.columns = columns_of(self.name, x)
        self.ranks, self.eps, self.momentum = ranks, eps, momentum
        vector = x.with_shape(self.columns.channels)
        self.inputs = {"x": x, "weight": vector, "bias": vector, "running_mean": vector, "running_var": vector}
        self.inputs["moments"] = Spec((ranks, 3, self.columns.channels), DOUBLE)
        self.outputs = {"y": x, "mean": vector, "inv_std": vector}
        self.flops = 3 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        self.kernel(device, "batch_norm_merge_ranks", b, g.merge_grid)
        self.kernel(device, "batch_norm_forward", b, g.grid, g.block, rows_per_chunk=g.rows_per_chunk)

    def reference(self, b: Buffers) -> None:
        self._statistics(b)
        b.y[...] = (b.x - b.mean) * b.inv_std * b.weight + b.bias

    def numpy(self, b: Buffers) -> None:
        self._statistics(b)
        fast.normalise(b.x, b.mean, b.weight * b.inv_std, b.bias, b.y)

    def _statistics(self, b: Buffers) -> None:
        counts, means, m2 = b.moments.swapaxes(0, 1)
        rows = counts.sum(0)
        mean = (counts * means).sum(0) / rows
        total = (m2 + counts * (means - mean) ** 2).sum(0)
        b.mean[...], b.inv_std[...] = mean, 1 / np.sqrt(total / rows + self.eps)
        b.running_mean[...] = (1 - self.momentum) * b.running_mean + self.momentum * mean
        b.running_var[...] = (1 - self.momentum) * b.running_var + self.momentum * total / (rows - 1)


class BatchNormBackwardSums(Op):
    """sums (2, c), float64, of dy and of dy x-hat; dweight, dbias (c): this rank's share of the gradients."""

    name = "batch_norm_backward_sums"

    def __init__(self, x: Spec) -> None:
        self.columns = columns_of(self.name, x)
        c = self.columns.channels
        vector = x.with_shape(c)
        self.inputs = {"x": x, "dy": x, "mean": vector, "inv_std": vector}
        self.outputs = {"sums": Spec((2, c), DOUBLE), "dweight": vector, "dbias": vector}
        self.workspace = {"partials": Spec((self.columns.chunks, 2, c), DOUBLE)}
        self.flops = 5 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        self.kernel(device, "batch_norm_backward_partial", b, g.grid, g.block, rows_per_chunk=g.rows_per_chunk)
        self.kernel(device, "batch_norm_backward_merge", b, g.merge_grid)

    def reference(self, b: Buffers) -> None:
        xhat, axes = (b.x - b.mean) * b.inv_std, (0, 1, 2)
        b.sums[...] = b.dy.sum(axes, dtype=np.float64), (b.dy * xhat).sum(axes, dtype=np.float64)
        b.dbias[...], b.dweight[...] = b.sums

    def numpy(self, b: Buffers) -> None:
        b.sums[...] = fast.backward_sums(b.x, b.dy, b.mean, b.inv_std)
        b.dbias[...], b.dweight[...] = b.sums


class BatchNormRanksBackward(Op):
    """dx, from the sums (ranks, 2, c) and moments (ranks, 3, c) of all ranks."""

    name = "batch_norm_ranks_backward"

    def __init__(self, x: Spec, ranks: int) -> None:
        self.columns, self.ranks = columns_of(self.name, x), ranks
        c = self.columns.channels
        vector = x.with_shape(c)
        self.inputs = {"x": x, "dy": x, "mean": vector, "inv_std": vector, "weight": vector}
        self.inputs |= {"sums": Spec((ranks, 2, c), DOUBLE), "moments": Spec((ranks, 3, c), DOUBLE)}
        self.outputs = {"dx": x}
        self.workspace = {"dweight": vector, "dbias": vector}
        self.flops = 6 * x.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        self.kernel(device, "batch_norm_backward_merge_ranks", b, g.merge_grid, rows=g.rows)
        self.kernel(device, "batch_norm_backward", b, g.grid, g.block, rows_per_chunk=g.rows_per_chunk, training=1)

    def reference(self, b: Buffers) -> None:
        dy_mean, dy_xhat_mean = b.sums.sum(0) / b.moments[:, 0].sum(0)
        xhat = (b.x - b.mean) * b.inv_std
        b.dx[...] = b.weight * b.inv_std * (b.dy - dy_mean - xhat * dy_xhat_mean)

    def numpy(self, b: Buffers) -> None:
        means = b.sums.sum(0) / b.moments[:, 0].sum(0)
        fast.backward_apply(b.x, b.dy, b.weight, b.mean, b.inv_std, means, b.dx)
