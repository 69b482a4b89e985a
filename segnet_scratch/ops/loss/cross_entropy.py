"""Softmax cross-entropy over the pixels of a batch, void pixels excluded."""

from collections.abc import Sequence

import numpy as np

from segnet_scratch.errors import ConfigError, DataError, DTypeError, ShapeError
from segnet_scratch.ops.loss import fast
from segnet_scratch.ops.op import VOID, Buffers, Op, Spec, element_grid, expect, expect_array, spec
from segnet_scratch.runtime.devices import Device

NORMALISATIONS = ("weights", "valid")
REDUCTIONS = ("mean", "sum", "none")
# By what a kernel divides: nothing, or one of its sums.
_DIVISORS = {"none": 0, "weights": 1, "valid": 2}
SUMS = spec((3,), np.float64)


class CrossEntropyOp(Op):
    """What forward and backward have in common; `normalisation` and `smoothing` are explained at the forward."""

    optional = ("class_weights",)

    def __init__(self, logits: Spec, normalisation: str = "weights", smoothing: float = 0.0) -> None:
        *pixels, self.classes = expect_array(self.name, "logits", logits, "..., classes")
        self.pixels = logits.size // self.classes
        expect(self.classes <= VOID, f"cross_entropy: {self.classes} classes; at most {VOID} fit beside void, {VOID}")
        expect_objective(normalisation, smoothing, tuple(_DIVISORS))
        self.normalisation, self.divisor, self.smoothing = normalisation, _DIVISORS[normalisation], smoothing
        labels = Spec(tuple(pixels), np.dtype(np.uint8))
        self.inputs = {"logits": logits, "labels": labels, "class_weights": logits.with_shape(self.classes)}

    def _rows(self, logits: np.ndarray) -> np.ndarray:
        return logits.reshape(self.pixels, self.classes)


class CrossEntropyForward(CrossEntropyOp):
    """loss (1) and sums (3) = weighted loss, weights, valid pixels. logits (..., classes), labels uint8 (...).

    `normalisation` divides by the sum of weights ("weights", as PyTorch does), by the number of valid pixels ("valid",
    as the authors' Caffe does) or by nothing ("none"). Without a valid pixel the loss is 0. `smoothing` spreads that
    share of a pixel's label over all classes; cuda/cross_entropy.cu has the formula.
    """

    name = "cross_entropy_forward"
    MAX_BLOCKS = 1024  # partial results that one block adds

    def __init__(self, logits: Spec, normalisation: str = "weights", smoothing: float = 0.0) -> None:
        super().__init__(logits, normalisation, smoothing)
        self.blocks = min(element_grid(self.pixels), self.MAX_BLOCKS)
        self.outputs = {"loss": logits.with_shape(1), "sums": SUMS}
        self.workspace = {"partials": Spec((self.blocks, 3), SUMS.dtype)}
        self.flops = 4 * logits.size

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "cross_entropy_partial", b, self.blocks)
        self.kernel(device, "cross_entropy_merge", b, 1)

    def reference(self, b: Buffers) -> None:
        valid = b.labels < self.classes
        logits, labels = b.logits[valid], b.labels[valid]
        highest = logits.max(axis=1, keepdims=True)
        log_total = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
        losses = log_total[:, None] - logits  # (valid pixels, classes): what each class would have cost
        class_weights = np.ones(self.classes) if b.class_weights is None else b.class_weights.astype(np.float64)
        weights = class_weights[labels]
        of_label = weights * losses[np.arange(len(labels)), labels]
        of_all = (class_weights * losses).mean(axis=1)
        total = (1 - self.smoothing) * of_label + self.smoothing * of_all
        b.sums[...] = total.sum(dtype=np.float64), weights.sum(), len(labels)
        self._divide(b)

    def gradient(self) -> tuple[Op, ...]:
        return (CrossEntropyBackward.plan(self.inputs["logits"], self.normalisation, self.smoothing),)

    def numpy(self, b: Buffers) -> None:
        fast.cross_entropy_forward(self._rows(b.logits), b.labels.reshape(-1), b.class_weights, self.smoothing, b.sums)
        self._divide(b)

    def _divide(self, b: Buffers) -> None:
        b.loss[0] = b.sums[0] * _reciprocal(b.sums, self.divisor)


class CrossEntropyBackward(CrossEntropyOp):
    """dlogits from the gradient of the loss (1) and the sums of the forward pass."""

    name = "cross_entropy_backward"

    def __init__(self, logits: Spec, normalisation: str = "weights", smoothing: float = 0.0) -> None:
        super().__init__(logits, normalisation, smoothing)
        self.inputs |= {"sums": SUMS, "dloss": logits.with_shape(1)}
        self.outputs = {"dlogits": logits}
        self.flops = 6 * logits.size

    def launch(self, device: Device, b: Buffers) -> None:
        self.kernel(device, self.name, b, element_grid(self.pixels))

    def reference(self, b: Buffers) -> None:
        valid = b.labels < self.classes
        labels = np.where(valid, b.labels, 0)
        exponentials = np.exp(b.logits - b.logits.max(axis=-1, keepdims=True))
        softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
        hot = np.arange(self.classes) == labels[..., None]
        class_weights = np.ones(self.classes) if b.class_weights is None else b.class_weights
        of_label = class_weights[labels][..., None] * (softmax - hot)
        of_all = (class_weights.sum() * softmax - class_weights) / self.classes
        gradient = (1 - self.smoothing) * of_label + self.smoothing * of_all
        b.dlogits[...] = np.where(valid[..., None], gradient * self._scale(b), 0)

    def numpy(self, b: Buffers) -> None:
        logits, dlogits = self._rows(b.logits), self._rows(b.dlogits)
        labels, scale = b.labels.reshape(-1), self._scale(b)
        fast.cross_entropy_backward(logits, labels, b.class_weights, self.smoothing, scale, dlogits)

    def _scale(self, b: Buffers) -> float:
        # In Python floats: NumPy would round the product to the type of dloss.
        return float(b.dloss[0]) * _reciprocal(b.sums, self.divisor)


def _reciprocal(sums: np.ndarray, divisor: int) -> float:
    """1 / normaliser; 0 where nothing counts, and NaN where the weights are no numbers."""
    normaliser = sums[divisor] if divisor else 1.0
    return float(1 / normaliser) if normaliser != 0 else 0.0


def expect_objective(normalisation: str, smoothing: float, normalisations: tuple[str, ...] = NORMALISATIONS) -> None:
    """ShapeError unless these are options of the loss."""
    expect_one_of("normalisation", normalisation, normalisations)
    expect(0 <= smoothing < 1, f"cross_entropy: smoothing {smoothing}; expected 0 <= smoothing < 1")


def expect_one_of(what: str, value: str, names: tuple[str, ...]) -> None:
    """ShapeError unless an option of the loss is one that there is."""
    expect(value in names, f"cross_entropy: {what} {value!r}; expected one of {', '.join(names)}")


def check_labels(labels: np.ndarray, classes: int, ignore_index: int = VOID) -> np.ndarray:
    """The labels as uint8, `ignore_index` among them as void (255), once all others are classes 0 .. classes - 1.

    DataError otherwise; DTypeError unless they are integers.
    """
    if labels.dtype.kind not in "iu":
        raise DTypeError(f"cross_entropy: labels have element type {labels.dtype}; expected integers")
    ignored = labels == ignore_index
    wrong = ~ignored & ((labels < 0) | (labels >= classes))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(
            f"cross_entropy: label {int(labels[where])} at {where} ({int(wrong.sum())} such pixels); expected 0 to "
            f"{classes - 1}, or {ignore_index} for void; check the masks with the data set's class list"
        )
    return (labels if ignore_index == VOID else np.where(ignored, VOID, labels)).astype(np.uint8, copy=False)


def check_class_weights(weights: np.ndarray | Sequence[float], classes: int, dtype: np.dtype) -> np.ndarray:
    """The weights (classes) in this element type; ConfigError unless they are numbers >= 0, and not all of them 0."""
    values = np.asarray(weights)
    if values.shape != (classes,):
        raise ShapeError(f"cross_entropy: class_weights has shape {values.shape}, expected ({classes},): one a class")
    wrong = [k for k, value in enumerate(values) if not (np.isreal(value) and 0 <= value < np.inf)]
    if wrong or not values.any():
        found = f"{values[wrong[0]]} for class {wrong[0]}" if wrong else "nothing but 0"
        raise ConfigError(f"cross_entropy: class_weights: {found}; expected numbers of at least 0, one of them above 0")
    return values.astype(dtype)
