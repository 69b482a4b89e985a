"""Rows of the loss, of the logarithm of a softmax, and of what counts right and wrong pixels."""

from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import ShapeError
from segnet_scratch.ops import by_hand
from segnet_scratch.ops.cases import (
    MAPS,
    Bounds,
    Case,
    Hostile,
    Inputs,
    MapRow,
    Refusal,
    Row,
    Shape,
    empty_outputs,
    maps,
    values,
)
from segnet_scratch.ops.loss.argmax import ArgmaxForward
from segnet_scratch.ops.loss.cross_entropy import NORMALISATIONS, CrossEntropyBackward, CrossEntropyForward
from segnet_scratch.ops.loss.log_softmax import LogSoftmaxBackward, LogSoftmaxForward
from segnet_scratch.ops.loss.softmax_cross_entropy import SoftmaxCrossEntropy
from segnet_scratch.ops.op import VOID, Buffers, Op, spec, spec_of
from segnet_scratch.runtime.precision import BFLOAT16


class CrossEntropyRow(Row):
    """Forward or backward, in one normalisation."""

    constants = ("class_weights",)

    normalisation: str

    def cases(self) -> list[Case]:
        sizes = {
            "size 1": (1, 1),
            "one pixel": (1, 21),
            "a small map": (35, 4),
            "a small map, weighted": (15, 21),
            "a pixel less than a block": (255, 2),
            "a block of pixels": (256, 3),
            "a pixel more than a block": (257, 21),
            "primes": (1009, 11),
            "most classes": (100, 255),
            "more pixels than the grid has threads": (262145, 2),
        }
        return [
            *(self._case(reason, *size, weighted=i % 2 == 1) for i, (reason, size) in enumerate(sizes.items())),
            self._case("void alone", 300, 4, void=1.0, weighted=True),
            self._case("no void", 300, 4, void=0.0),
            self._case("logits of +-1e4", 500, 21, scale=1e4),
            self._case("equal logits", 500, 21, scale=0.0, weighted=True),
            self._case("smoothed labels", 300, 21, smoothing=0.1),
            self._case("smoothed labels, weighted", 257, 4, weighted=True, smoothing=0.3),
            self._case("smoothed labels, logits of +-1e4", 500, 21, scale=1e4, smoothing=0.1),
        ]

    def _case(self, reason: str, pixels: int, classes: int, **options: Any) -> Case:
        defaults = {"void": 0.2, "scale": 3.0, "weighted": False, "smoothing": 0.0}
        return Case(reason, {"pixels": pixels, "classes": classes, **defaults, **options})

    def chosen(
        self,
        logits: Shape,
        normalisation: str = "weights",
        weighted: int = 0,
        void: float = 0.25,
        smoothing: float = 0.0,
    ) -> Case:
        options = {"normalisation": normalisation, "weighted": bool(weighted), "void": void, "smoothing": smoothing}
        return self._case("chosen", prod(logits[:-1]), logits[-1], **options)

    def arguments(self, case: Case, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {**case.sizes, **arrays, "labels": arrays["labels"].reshape(arrays["logits"].shape[:-1])}

    def differentiable(self, case: Case) -> bool:
        return bool(case["scale"] < 100)  # the digits of a loss of many hundreds end before those of a difference

    def random_case(self, rng: np.random.Generator) -> Case:
        pixels, classes = int(rng.integers(1, 2000)), int(rng.integers(1, 60))
        scale = float(rng.choice([0.1, 3, 100]))
        options = {"void": float(rng.uniform(0, 1)), "scale": scale, "weighted": bool(rng.integers(2))}
        smoothing = float(rng.choice([0.0, rng.uniform(0, 1)]))
        return self._case("random", pixels, classes, **options, smoothing=smoothing)

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec((case["pixels"], case["classes"]), dtype), self.normalisation, case["smoothing"])

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        logits, classes = op.inputs["logits"], case["classes"]
        labels = rng.integers(0, classes, op.inputs["labels"].shape, np.uint8)
        labels[rng.random(labels.shape) < case["void"]] = VOID
        weights = rng.uniform(0.1, 3, classes).astype(op.inputs["class_weights"].dtype) if case["weighted"] else None
        x = np.clip(values(rng, logits, integers).astype(np.float64) * case["scale"], -1e4, 1e4).astype(logits.dtype)
        arrays: Inputs = {"logits": x, "labels": labels, "class_weights": weights}
        if "sums" not in op.inputs:
            return arrays
        forward = CrossEntropyForward.plan(logits, self.normalisation)
        sums = Buffers(**arrays, **empty_outputs(forward))
        forward.reference(sums)
        return {**arrays, "sums": sums.sums, "dloss": values(rng, op.inputs["dloss"])}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        bounds = errors(b, eps, self.normalisation, op.smoothing)  # type: ignore[attr-defined]
        return {name: bounds[name] for name in op.outputs}

    def refusals(self) -> list[Refusal]:
        wrong = {
            "no dimensions": ("expected (..., classes)", {"logits": spec(())}),
            "256 classes": ("at most 255", {"logits": spec((3, 256))}),
            "normalisation": ("'sum'", {"normalisation": "sum"}),
            "smoothing": ("smoothing 1.0", {"smoothing": 1.0}),
        }
        return self.refused({"logits": spec((3, 2))}, wrong)


class SoftmaxCrossEntropyRow(CrossEntropyRow):
    """Loss and gradient of padded logits, as the fused engine has them."""

    op, elements = SoftmaxCrossEntropy, (np.dtype(np.float32), BFLOAT16)

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        classes = case["classes"]
        logits = spec((1, 1, case["pixels"], -(-classes // 8) * 8), dtype)
        return SoftmaxCrossEntropy.plan(logits, classes, self.normalisation, case["smoothing"])

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        share = rng.uniform(0.1, 1, 1) if rng.integers(2) else None
        return {**super().inputs(op, case, rng, integers), "share": share}

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        classes = op.classes  # type: ignore[attr-defined]
        logits = np.ascontiguousarray(b.logits[..., :classes].reshape(-1, classes))
        labels = b.labels.reshape(-1)
        parts = CrossEntropyForward.plan(spec_of(logits), self.normalisation, op.smoothing)  # type: ignore[attr-defined]
        plain = Buffers(logits=logits, labels=labels, class_weights=b.class_weights, **empty_outputs(parts))
        parts.reference(plain)
        plain.dloss = np.ones(1) if b.share is None else b.share
        bounds = errors(plain, eps, self.normalisation, op.smoothing)  # type: ignore[attr-defined]
        dlogits = np.zeros(b.logits.shape)
        dlogits[..., :classes] = np.asarray(bounds["dlogits"]).reshape(*b.logits.shape[:3], classes)
        return {"loss": bounds["loss"] * plain.dloss[0], "dlogits": dlogits}

    def refusals(self) -> list[Refusal]:
        wrong = {
            "two dimensions": ("channels last", {"logits": spec((3, 8))}),
            "half a piece": ("use a width", {"logits": spec((1, 2, 3, 6))}),
            "more classes than channels": ("9 classes in 8 channels", {"classes": 9}),
            "256 classes": ("expected 1 to 255", {"logits": spec((1, 2, 3, 256)), "classes": 256}),
            "normalisation": ("'sum'", {"normalisation": "sum"}),
            "smoothing": ("smoothing 1.0", {"smoothing": 1.0}),
        }
        return self.refused({"logits": spec((1, 2, 3, 8)), "classes": 5}, wrong)


def errors(b: Buffers, eps: float, normalisation: str, smoothing: float) -> Bounds:
    """Of the sums, the loss, and where there is a gradient of the loss that of the logits."""
    # With d = z - max z, exact but for one rounding: log sum exp(d) errs by sqrt(classes) + |d exp(d)| < 1, and
    # d[label] by itself; a softmax relatively by all of that. Smoothing adds as many d as there are classes.
    classes = b.logits.shape[1]
    d = b.logits - b.logits.max(axis=1, keepdims=True)
    exponentials = np.exp(d)
    log_sum = np.log(exponentials.sum(axis=1))
    valid = b.labels < classes
    labels = np.where(valid, b.labels, 0)
    class_weights = np.ones(classes) if b.class_weights is None else b.class_weights
    weights = valid * class_weights[labels]
    unit = 2 * eps * (sqrt(classes) + 1)
    relative = unit + 2 * eps * (log_sum[:, None] - d)
    normaliser = max({"none": 1.0, "weights": b.sums[1], "valid": b.sums[2]}[normalisation], 1e-30)
    error = (1 - smoothing) * (weights @ np.take_along_axis(relative, labels[:, None].astype(int), 1)[:, 0])
    if smoothing:
        error += smoothing * sqrt(classes) * (valid @ (class_weights * relative).mean(axis=1))
    doubles = np.finfo(np.float64).eps * len(labels)  # the order of sums in double differs from NumPy's
    bounds: Bounds = {"sums": np.array([error + doubles * abs(b.sums[0]), doubles * b.sums[1], 0])}
    if hasattr(b, "loss"):
        bounds["loss"] = error / normaliser + 4 * eps * np.abs(b.loss)
    if not hasattr(b, "dloss"):
        return bounds
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    hot = np.arange(classes) == labels[:, None]
    of_label = weights[:, None] * (softmax * (relative + 2 * eps) + 2 * eps * hot)
    # The sum of the weights errs like any sum, and adding the share of every class rounds once more.
    of_all = valid[:, None] * (softmax * class_weights.sum() * (relative + unit) + class_weights * 4 * eps) / classes
    added = (1 - smoothing) * weights[:, None] * (softmax + hot)
    added += smoothing * valid[:, None] * (softmax * class_weights.sum() + class_weights) / classes
    share = smoothing * of_all + (2 * eps * added if smoothing else 0)
    return {**bounds, "dlogits": abs(b.dloss[0]) / normaliser * ((1 - smoothing) * of_label + share)}


class ArgmaxRow(MapRow):
    """Up to 256 classes a pixel; integer logits have many ties."""

    def cases(self) -> list[Case]:
        sizes = {"one class": (3, 1), "two dimensions": (257, 21), "most classes": (10, 256), **MAPS}
        return [case for case in maps(sizes) if case["x"][-1] <= 256]

    def hostile(self, rng: np.random.Generator) -> Hostile:
        logits = rng.choice(by_hand.SPECIAL, rng.integers(1, (60, 8))).astype(np.float32)
        return Hostile(ArgmaxForward.plan(spec_of(logits)), {"logits": logits}, {"labels": by_hand.argmax(logits)})

    def refusals(self) -> list[Refusal]:
        wrong = {
            "one dimension": ("expected (..., classes)", {"logits": spec((4,))}),
            "257 classes": ("at most 256", {"logits": spec((4, 257))}),
        }
        return self.refused({}, wrong)


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


ROWS: tuple[Row, ...] = (
    *(
        CrossEntropyRow(op, name=f"{op.name}_{how}", normalisation=how, function=function)
        for op in (CrossEntropyForward, CrossEntropyBackward)
        for how, function in (*((how, "cross_entropy") for how in NORMALISATIONS), ("none", ""))
    ),
    *(SoftmaxCrossEntropyRow(name=f"softmax_cross_entropy_{how}", normalisation=how) for how in NORMALISATIONS),
    *(ArgmaxRow(ArgmaxForward), LogSoftmaxRow(LogSoftmaxForward), LogSoftmaxRow(LogSoftmaxBackward)),
)
