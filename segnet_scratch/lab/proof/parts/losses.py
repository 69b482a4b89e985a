"""The edges of the loss: nothing to average, logits that overflow an exponential, labels that are no class.

What is expected was derived by hand.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.errors import DataError, DTypeError, SegnetError, ShapeError
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.parts.refusals import unrefused
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.ops.cases import Refusal
from segnet_scratch.ops.loss.cross_entropy import NORMALISATIONS
from segnet_scratch.ops.op import VOID
from segnet_scratch.runtime.devices import Device


@dataclass(frozen=True)
class Edge:
    """A call of cross_entropy with the loss and, unless it is None, the gradient that it must give."""

    logits: np.ndarray
    arguments: tuple[Any, ...]  # labels, class weights, normalisation
    loss: float = 0.0
    gradient: Any = None

    def tensor(self, device: Device) -> Tensor:
        """The logits on a device."""
        return Tensor(device.upload(self.logits.astype(np.float32)), device, requires_grad=True)

    def problems(self, device: Device) -> Iterator[str]:
        """What is not as expected, to a few roundings; a NaN never is."""
        z = self.tensor(device)
        loss = cross_entropy(z, *self.arguments)
        loss.backward()
        got: dict[str, Any] = {"loss": loss.item(), "gradient": device.download(z.grad)}
        for what, expected in (("loss", self.loss), ("gradient", self.gradient)):
            if expected is not None and not np.allclose(got[what], expected, rtol=1e-6, atol=1e-7):
                yield f"{what} is {got[what]}, expected {expected}"


@dataclass(frozen=True)
class Refused(Edge):
    """A call that must meet this error, with these words."""

    error: type[SegnetError] = ShapeError
    message: str = ""

    def problems(self, device: Device) -> Iterator[str]:
        attempt = functools.partial(cross_entropy, self.tensor(device), *self.arguments)
        return unrefused(Refusal("cross_entropy", attempt, self.error, self.message))


def _labelled(label: int) -> np.ndarray:
    """Labels (1, 2, 3) of class 0, and one of another."""
    labels = np.zeros((1, 2, 3), np.int64)
    labels[0, 1, 2] = label
    return labels


_NOISE, _ALL_VOID = np.random.default_rng(0).standard_normal((2, 3, 4, 5)), np.full((2, 3, 4), VOID)
_TWO, _ONE_AND_TWO = np.zeros((1, 1, 2, 3)), np.array([[[1, 2]]])
_FOUR = np.array([[[0, 0], [1, 2]]])
_SIGNS = np.array([[1, -1, -1], [-1, 1, 1], [1, 1, 1], [-1, -1, -1]]).reshape(1, 2, 2, 3)
_THIRD, _SECOND = 1 / 3, 1 / (1 + np.exp(0.5))  # probabilities: of one of three, of a logit that is less by 0.5
_GRADIENT = np.array([[0, 0, 0], [-1, 0.5, 0.5], [_THIRD, _THIRD - 1, _THIRD], [_THIRD, _THIRD, _THIRD - 1]]) / 4
_PLAIN, _SIX = np.zeros((1, 2, 3, 4)), np.zeros((1, 2, 3), np.uint8)
_NO_CLASS = "label {} at (0, 1, 2) (1 such pixels); expected 0 to 20, or 255"

EDGES: dict[str, Sequence[Edge]] = {
    "a batch all void": [Edge(_NOISE, (_ALL_VOID, np.ones(5), by), 0, 0) for by in NORMALISATIONS],
    "every pixel of a class of weight 0": [
        Edge(_TWO, (_ONE_AND_TWO, np.array([1.0, 0, 0])), 0, 0),
        Edge(_TWO, (_ONE_AND_TWO,), np.log(3)),
    ],
    "logits of +-1e4": [
        Edge(1e4 * _SIGNS, (_FOUR,), (0 + (2e4 + np.log(2)) + 2 * np.log(3)) / 4, _GRADIENT.reshape(_SIGNS.shape))
    ],
    # Added to log sum exp, 1e4 would round the difference of 0.5 to a multiple of 1/1024.
    "a small difference of large logits": [
        Edge(np.array([[[[1e4, 1e4 - 0.5]]]]), (np.array([[[0]]]),), np.log1p(np.exp(-0.5)), [-_SECOND, _SECOND])
    ],
    "one class": [Edge(np.full((1, 2, 2, 1), 7.0), (np.zeros((1, 2, 2), np.uint8),), 0, 0)],
    "labels of every integer type": [
        Edge(np.zeros((1, 1, 3, 4)), (np.array([[[0, 3, VOID]]], kind),), np.log(4))
        for kind in (np.uint8, np.int16, np.int32, np.int64, np.uint64)
    ],
    "labels that are no class": [
        Refused(np.zeros((1, 2, 3, 21)), (_labelled(label),), error=DataError, message=_NO_CLASS.format(label))
        for label in (21, 254, -1, 256, 1000)
    ],
    "labels, weights and options that do not fit": [
        Refused(_PLAIN, (_SIX.astype(np.float64),), error=DTypeError, message="type float64; expected integers"),
        Refused(_PLAIN, (_SIX.reshape(1, 3, 2),), message="labels (1, 3, 2) do not fit logits (1, 2, 3, 4)"),
        Refused(_PLAIN, (_SIX, np.ones(3)), message="class_weights has shape (3,), expected (4,)"),
        Refused(_PLAIN, (_SIX, None, "mean"), message="'mean'; expected one of weights, valid"),
    ],
}


class Losses(Part):
    """All edges, on each device."""

    name = "loss edges"
    proves = "all void, logits of +-1e4, labels that are no class: finite, or a named error"

    def targets(self, rows: Rows) -> Sequence[str]:
        return ["cross_entropy"] if any(row.op.name.startswith("cross_entropy") for row in rows) else []

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        for name, edges in EDGES.items():
            tally.counts["edges"] += 1
            with tally.attempt(work, name):
                yield from (f"{name}: {problem}" for edge in edges for problem in edge.problems(device))
