"""Rows of batch norm."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.cases import COLUMN_MAPS, Bounds, Case, Inputs, Refusal, Row, Shape, maps, random_map
from segnet_scratch.ops.normalisation.batch_norm import (
    BatchNormBackward,
    BatchNormEvaluationForward,
    BatchNormLesson,
    BatchNormTrainingForward,
)
from segnet_scratch.ops.normalisation.batch_norm_ranks import (
    BatchNormBackwardSums,
    BatchNormMoments,
    BatchNormRanksBackward,
    BatchNormRanksForward,
)
from segnet_scratch.ops.op import Buffers, Op, spec


class BatchNormRow(Row):
    """What the three ops share. `offset` is the mean of x in units of its standard deviation."""

    constants = ("running_mean", "running_var")
    options: Mapping[str, Any] = {}  # of the plan

    def cases(self) -> list[Case]:
        return [
            *maps(COLUMN_MAPS, offset=1.0, scale=1.0),
            *maps({"mean 1000 times the deviation: E[x^2] - E[x]^2 would cancel": (2, 9, 9, 7)}, offset=1e3, scale=1.0),
            *maps({"constant channels: variance 0": (2, 5, 5, 3)}, offset=3.0, scale=0.0),
            *maps({"variance far below eps": (2, 5, 5, 3)}, offset=0.0, scale=1e-4),
            *maps({"large values": (1, 6, 5, 4)}, offset=1.0, scale=1e4),
        ]

    def chosen(self, x: Shape, training: int = 1) -> Case:
        return Case("chosen", {"x": x, "offset": 0.0, "scale": 1.0, "training": bool(training)})

    def differentiable(self, case: Case) -> bool:
        # Large values lose the digits of x + 1e-6; each channel is by itself, so few of them show as much as many.
        return bool(case["offset"] < 100 and case["scale"] < 100 and case["x"][3] < 8)

    def random_case(self, rng: np.random.Generator) -> Case:
        n, h, w, c = random_map(rng, 80)
        return Case("random", {"x": (n + 1, h, w, c), "offset": float(rng.choice([0, 1, 30])), "scale": 1.0})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec(case["x"], dtype), **self.options)

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        x, dtype = arrays["x"], op.inputs["x"].dtype
        assert x is not None
        offsets = case["offset"] * (max(case["scale"], 0.1) * rng.choice([-1, 1], x.shape[3]) + 0.1)
        arrays["x"] = x = (x * case["scale"] + offsets).astype(dtype)
        if "running_var" in arrays:
            arrays["running_var"] = rng.uniform(0.1, 4, x.shape[3]).astype(dtype)
        if "inv_std" in arrays:
            mean = x.mean((0, 1, 2), dtype=np.float64)
            arrays["mean"] = mean.astype(dtype)
            arrays["inv_std"] = (1 / np.sqrt(((x - mean) ** 2).mean((0, 1, 2)) + 1e-5)).astype(dtype)
        return arrays

    def refusals(self) -> list[Refusal]:
        return self.refused(self.options, {"two dimensions": ("channels last", {"x": spec((4, 3))})})


class BatchNormTrainingRow(BatchNormRow):
    """Training: errors of the statistics are carried through to y."""

    op: type[Op] = BatchNormTrainingForward
    training, function = True, "batch_norm"

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        rows, momentum = b.x.size / b.mean.size, op.momentum  # type: ignore[attr-defined]
        # A mean errs by its sum of absolute terms, a variance merged as (count, mean, M2) relatively by the condition
        # number kappa = rms / deviation (Chan, Golub, LeVeque 1983, table 2); squared where the mean itself errs. That
        # is for NumPy, which sums the pixels of a chunk in their own type; the kernels sum in double.
        unit = 2 * eps * sqrt(rows)
        rms = np.sqrt((b.x**2).mean((0, 1, 2)))
        variance = b.x.var((0, 1, 2))
        d_mean = unit * rms
        d_variance = unit * (variance + rms * np.sqrt(variance)) + d_mean**2
        d_scale = d_variance * b.inv_std**2 / 2 + 4 * eps  # relative error of inv_std
        centred = np.abs(b.x - b.mean)
        gain = np.abs(b.weight) * b.inv_std
        return {
            "y": gain * (d_mean + centred * (d_scale + 4 * eps)) + 2 * eps * np.abs(b.bias),
            "mean": d_mean,
            "inv_std": d_scale * b.inv_std,
            "running_mean": momentum * d_mean + 4 * eps * (np.abs(b.running_mean) + momentum * rms),
            "running_var": momentum * rows / (rows - 1) * d_variance + 4 * eps * b.running_var,
        }

    def refusals(self) -> list[Refusal]:
        single = {"one value a channel": ("n*h*w > 1", {"x": spec((1, 1, 1, 3))})}
        return [*super().refusals(), *self.refused(self.options, single)]


class BatchNormEvaluationRow(BatchNormRow):
    """Evaluation: element by element."""

    op, training, function = BatchNormEvaluationForward, False, "batch_norm"

    def cases(self) -> list[Case]:
        single = maps({"size 1: one value a channel is enough here": (1, 1, 1, 1)}, offset=0.0, scale=1.0)
        return [*single, *super().cases()]

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        normalised = np.abs(b.x - b.mean) * b.inv_std * np.abs(b.weight)
        return {"y": 4 * eps * (normalised + np.abs(b.bias)), "inv_std": 4 * eps * b.inv_std}


class BatchNormBackwardRow(BatchNormRow):
    """Backward of both modes."""

    op = BatchNormBackward

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        rows, axes = b.x.size / b.mean.size, (0, 1, 2)
        xhat, dy = np.abs(b.x - b.mean) * b.inv_std, np.abs(b.dy)
        unit = 4 * eps * sqrt(rows)
        sum_dy, sum_dy_xhat = dy.sum(axes), (dy * xhat).sum(axes)
        dx = 4 * eps * dy
        if self.options["training"]:
            dx = dx + unit * (sum_dy + xhat * sum_dy_xhat) / rows
        return {"dx": np.abs(b.weight) * b.inv_std * dx, "dweight": unit * sum_dy_xhat, "dbias": unit * sum_dy}


class BatchNormLessonRow(BatchNormTrainingRow):
    """Training by a kernel that teaches."""

    op, function = BatchNormLesson, ""


class BatchNormRanksRow(BatchNormRow):
    """The halves of batch norm over several ranks: of x here, and of two ranks more, one of them with a single row."""

    function = ""

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        arrays = super().inputs(op, case, rng, integers)
        if (moments := arrays.get("moments")) is not None:
            x = np.asarray(arrays["x"], np.float64)
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            moments[:, 0] = np.array([[x.size // x.shape[3]], [5], [1]])
            moments[:, 1] = mean, mean + 1, mean - 1
            moments[:, 2] = variance * moments[0, 0], 7 * variance, 0 * variance
        return arrays

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        axes, rows = (0, 1, 2), b.x.size / b.x.shape[3]
        if isinstance(op, BatchNormMoments):  # as of BatchNormTrainingRow
            unit, rms, m2 = 2 * eps * sqrt(rows), np.sqrt((b.x**2).mean(axes)), b.moments[2]
            d_mean = unit * rms
            return {"moments": np.stack([0 * rms, d_mean, unit * (m2 + rms * np.sqrt(m2 * rows)) + rows * d_mean**2])}
        if isinstance(op, BatchNormRanksForward):
            d_mean = 4 * eps * np.abs(b.moments[:, 1]).max(0)
            gain = np.abs(b.weight) * b.inv_std
            unbiased = 2 / b.inv_std**2  # of more than one row, at most twice the biased one
            return {
                "y": gain * (d_mean + 8 * eps * np.abs(b.x - b.mean)) + 2 * eps * np.abs(b.bias),
                "mean": d_mean,
                "inv_std": 4 * eps * b.inv_std,
                "running_mean": d_mean + 4 * eps * np.abs(b.running_mean),
                "running_var": 8 * eps * (b.running_var + unbiased),
            }
        xhat, dy = np.abs(b.x - b.mean) * b.inv_std, np.abs(b.dy)
        if isinstance(op, BatchNormRanksBackward):
            means = np.abs(b.sums).sum(0) / b.moments[:, 0].sum(0)
            return {"dx": 8 * eps * np.abs(b.weight) * b.inv_std * (dy + means[0] + xhat * means[1])}
        unit = 4 * eps * sqrt(rows)
        sums = unit * np.stack([dy.sum(axes), (dy * xhat).sum(axes)])
        return {"sums": sums, "dweight": sums[1], "dbias": sums[0]}


_OF_RANKS: dict[type[Op], dict[str, int]] = {
    BatchNormMoments: {},
    BatchNormRanksForward: {"ranks": 3},
    BatchNormBackwardSums: {},
    BatchNormRanksBackward: {"ranks": 3},
}
ROWS: tuple[Row, ...] = (
    *(BatchNormLessonRow(rung=rung, options={"rung": rung}) for rung in ("thread", "block")),
    *(BatchNormRanksRow(op, options=options) for op, options in _OF_RANKS.items()),
    *(BatchNormTrainingRow(), BatchNormEvaluationRow()),
    BatchNormBackwardRow(name="batch_norm_backward_training", options={"training": True}),
    BatchNormBackwardRow(name="batch_norm_backward_evaluation", options={"training": False}),
)
