"""Rows of the logarithm of a softmax."""

from math import sqrt

import numpy as np

from segnet_scratch.errors import ShapeError
from segnet_scratch.ops.cases import MAPS, Bounds, Case, Inputs, MapRow, Refusal, maps, values
from segnet_scratch.ops.loss.log_softmax import LogSoftmaxBackward, LogSoftmaxForward
from segnet_scratch.ops.op import Buffers, Op, spec


class LogSoftmaxRow(MapRow):
    """Logits up to +-1e4 must not overflow, nor round away the small ones."""

    exact = False

    def cases(self) -> list[Case]:
        return [
            *maps({"one axis": (7,), "most classes": (10, 255), **MAPS}),
            Case("large", {"x": (50, 21), "scale": 1e4}),
        ]

    def differentiable(self, case: Case) -> bool:
        return "scale" not in case.sizes  # differences of logits of 1e4 have few digits

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        x = values(rng, next(iter(op.inputs.values())), integers) * case.sizes.get("scale", 3.0)
        if self.op is LogSoftmaxForward:
            return {"x": x.astype(op.inputs["x"].dtype)}
        log_softmax = x - x.max(-1, keepdims=True)
        log_softmax -= np.log(np.exp(log_softmax).sum(-1, keepdims=True))
        return {"y": log_softmax.astype(x.dtype), "dy": values(rng, op.inputs["dy"], integers)}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        if self.op is LogSoftmaxForward:
            d = b.x - b.x.max(-1, keepdims=True)
            log_sum = np.log(np.exp(d).sum(-1, keepdims=True))
            return {"y": 2 * eps * (sqrt(b.x.shape[-1]) + 1 + log_sum - d)}
        softmax, terms = np.exp(b.y), np.abs(b.dy).sum(-1, keepdims=True)
        grown = 2 * eps * (sqrt(b.y.shape[-1]) + 3 + np.abs(b.y))
        return {"dx": eps * np.abs(b.dx) + grown * softmax * terms + eps * np.abs(b.dy)}

    def refusals(self) -> list[Refusal]:
        return [Refusal("no classes", lambda: self.op.plan(spec((3, 0), np.float32)), ShapeError, "is empty")]


ROWS = LogSoftmaxRow(LogSoftmaxForward), LogSoftmaxRow(LogSoftmaxBackward)
