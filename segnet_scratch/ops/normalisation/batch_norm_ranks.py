"""Batch norm over a batch that several ranks share: each sends the others its moments, and its sums of backward.

    moments of x -> those of all ranks -> y                 (in training; evaluation asks nobody)
    sums of dy   -> those of all ranks -> dx

Between the two halves a communicator gathers; every rank merges in the order of the ranks, and has the same bits.
"""

from typing import ClassVar

import numpy as np

from segnet_scratch.ops.normalisation import fast
from segnet_scratch.ops.normalisation.batch_norm import AXES, DOUBLE, EPS, MOMENTUM, BatchNormOp, ForwardOp, normalised
from segnet_scratch.ops.op import Buffers, Op, Spec


class BatchNormMoments(BatchNormOp):
    """moments (3, c), float64: the rows of x (n, h, w, c), the mean of each channel, its squared distances from it."""

    name = "batch_norm_moments"
    flops_each = 4
    stages: ClassVar = {"batch_norm_partial_statistics": "rows", "batch_norm_moments": "channels"}

    def __init__(self, x: Spec) -> None:
        super().__init__(x)
        self.inputs, self.workspace = {"x": x}, {"partials": self.partials}
        self.outputs = {"moments": Spec((3, self.channels), DOUBLE)}

    def reference(self, b: Buffers) -> None:
        x = b.x.astype(np.float64)
        b.moments[0] = self.rows
        b.moments[1:] = x.mean(AXES), ((x - x.mean(AXES)) ** 2).sum(AXES)

    def numpy(self, b: Buffers) -> None:
        mean, variance = fast.statistics(b.x)
        b.moments[0] = self.rows
        b.moments[1:] = mean, variance * self.rows


class BatchNormRanksForward(ForwardOp):
    """As BatchNormTrainingForward, from the moments (ranks, 3, c) of all ranks."""

    name = "batch_norm_ranks_forward"
    updates = ("running_mean", "running_var")
    flops_each = 3
    stages: ClassVar = {"batch_norm_merge_ranks": "channels", "batch_norm_forward": "rows"}

    def __init__(self, x: Spec, ranks: int, eps: float = EPS, momentum: float = MOMENTUM) -> None:
        super().__init__(x, eps, momentum)
        self.ranks = ranks
        self.inputs["moments"] = Spec((ranks, 3, self.channels), DOUBLE)

    def reference(self, b: Buffers) -> None:
        merge_moments(self, b, *b.moments.swapaxes(0, 1))
        b.y[...] = normalised(b)

    def numpy(self, b: Buffers) -> None:
        merge_moments(self, b, *b.moments.swapaxes(0, 1))
        fast.normalise(b.x, b.mean, b.weight * b.inv_std, b.bias, b.y)


def merge_moments(op: Op, b: Buffers, counts: np.ndarray, means: np.ndarray, m2: np.ndarray) -> None:
    """Statistics of all rows from those of parts (parts, c), float64: how many, mean, squared distances from it."""
    eps, momentum = op.eps, op.momentum  # type: ignore[attr-defined]
    rows = counts.sum(0)
    mean = (counts * means).sum(0) / rows
    total = (m2 + counts * (means - mean) ** 2).sum(0)
    b.mean[...], b.inv_std[...] = mean, 1 / np.sqrt(total / rows + eps)
    b.running_mean[...] = (1 - momentum) * b.running_mean + momentum * mean
    b.running_var[...] = (1 - momentum) * b.running_var + momentum * total / (rows - 1)


class BatchNormBackwardSums(BatchNormOp):
    """sums (2, c), float64, of dy and of dy x-hat; dweight, dbias (c): this rank's share of the gradients."""

    name = "batch_norm_backward_sums"
    flops_each = 5
    stages: ClassVar = {"batch_norm_backward_partial": "rows", "batch_norm_backward_merge": "channels"}

    def __init__(self, x: Spec) -> None:
        super().__init__(x)
        self.inputs = {"x": x, "dy": x, **self.vectors("mean", "inv_std")}
        self.outputs = {"sums": Spec((2, self.channels), DOUBLE), **self.vectors("dweight", "dbias")}
        self.workspace = {"partials": self.partials}

    def reference(self, b: Buffers) -> None:
        xhat = (b.x - b.mean) * b.inv_std
        b.sums[...] = b.dy.sum(AXES, dtype=np.float64), (b.dy * xhat).sum(AXES, dtype=np.float64)
        b.dbias[...], b.dweight[...] = b.sums

    def numpy(self, b: Buffers) -> None:
        b.sums[...] = fast.backward_sums(b.x, b.dy, b.mean, b.inv_std)
        b.dbias[...], b.dweight[...] = b.sums


class BatchNormRanksBackward(BatchNormOp):
    """dx, from the sums (ranks, 2, c) and moments (ranks, 3, c) of all ranks."""

    name = "batch_norm_ranks_backward"
    flops_each = 6
    stages: ClassVar = {"batch_norm_backward_merge_ranks": "channels", "batch_norm_backward": "rows"}
    training = True

    def __init__(self, x: Spec, ranks: int) -> None:
        super().__init__(x)
        self.ranks = ranks
        self.inputs = {"x": x, "dy": x, **self.vectors("mean", "inv_std", "weight")}
        self.inputs |= {name: Spec((ranks, n, self.channels), DOUBLE) for name, n in (("sums", 2), ("moments", 3))}
        self.outputs, self.workspace = {"dx": x}, self.vectors("dweight", "dbias")

    def reference(self, b: Buffers) -> None:
        dy_mean, dy_xhat_mean = b.sums.sum(0) / b.moments[:, 0].sum(0)
        xhat = (b.x - b.mean) * b.inv_std
        b.dx[...] = b.weight * b.inv_std * (b.dy - dy_mean - xhat * dy_xhat_mean)

    def numpy(self, b: Buffers) -> None:
        means = b.sums.sum(0) / b.moments[:, 0].sum(0)
        fast.backward_apply(b.x, b.dy, b.weight, b.mean, b.inv_std, means, b.dx)
