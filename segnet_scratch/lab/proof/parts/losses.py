"""The edges of the loss: nothing to average, logits that overflow an exponential, labels that are no class.

Each edge is a function of a device that gives what is wrong; what is expected was derived by hand.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

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

Problems = Iterator[str]
EDGES: dict[str, Callable[[Device], Problems]] = {}


class Losses(Part):
    """All edges, on each device."""

    name = "loss edges"
    proves = "all void, logits of +-1e4, labels that are no class: finite, or a named error"

    def targets(self, rows: Rows) -> Sequence[str]:
        return ["cross_entropy"] if any(row.op.name.startswith("cross_entropy") for row in rows) else []

    def problems(self, work: Work, device: Device, tally: Tally) -> Problems:
        for edge, problems in EDGES.items():
            tally.counts["edges"] += 1
            with tally.attempt(work, edge):
                yield from (f"{edge}: {problem}" for problem in problems(device))


def _edge(name: str) -> Callable[[Callable[[Device], Problems]], None]:
    return functools.partial(EDGES.__setitem__, name)


def _tensor(device: Device, logits: np.ndarray) -> Tensor:
    return Tensor(device.upload(logits.astype(np.float32)), device, requires_grad=True)


def _unequal(what: str, got: float | np.ndarray, expected: float | np.ndarray) -> Problems:
    """A problem unless values agree to a few roundings; a NaN never does."""
    if not np.allclose(got, expected, rtol=1e-6, atol=1e-7):
        yield f"{what} is {got}, expected {expected}"


def _loss_and_gradient(
    device: Device, logits: np.ndarray, labels: np.ndarray, *options: np.ndarray | str | None
) -> tuple[float, np.ndarray]:
    z = _tensor(device, logits)
    loss = cross_entropy(z, labels, *options)  # type: ignore[arg-type]
    loss.backward()
    return loss.item(), device.download(z.grad)


@_edge("a batch all void")
def _(device: Device) -> Problems:
    for normalisation in NORMALISATIONS:
        logits = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
        loss, gradient = _loss_and_gradient(device, logits, np.full((2, 3, 4), VOID), np.ones(5), normalisation)
        yield from _unequal(f"loss by {normalisation}", loss, 0)
        yield from _unequal(f"gradient by {normalisation}", gradient, np.zeros_like(gradient))


@_edge("every pixel of a class of weight 0")
def _(device: Device) -> Problems:
    labels = np.array([[[1, 2]]])
    loss, gradient = _loss_and_gradient(device, np.zeros((1, 1, 2, 3)), labels, np.array([1.0, 0, 0]))
    yield from _unequal("loss", loss, 0)
    yield from _unequal("gradient", gradient, np.zeros_like(gradient))
    loss, _ = _loss_and_gradient(device, np.zeros((1, 1, 2, 3)), labels)
    yield from _unequal("loss without weights", loss, np.log(3))


@_edge("logits of +-1e4")
def _(device: Device) -> Problems:
    signs = np.array([[1, -1, -1], [-1, 1, 1], [1, 1, 1], [-1, -1, -1]])
    loss, gradient = _loss_and_gradient(device, 1e4 * signs.reshape(1, 2, 2, 3), np.array([[[0, 0], [1, 2]]]))
    yield from _unequal("loss", loss, (0 + (2e4 + np.log(2)) + 2 * np.log(3)) / 4)
    third = 1 / 3
    expected = np.array([[0, 0, 0], [-1, 0.5, 0.5], [third, third - 1, third], [third, third, third - 1]])
    yield from _unequal("gradient", gradient.reshape(4, 3), expected / 4)


@_edge("a small difference of large logits")
def _(device: Device) -> Problems:
    # Added to log sum exp, 1e4 would round the difference of 0.5 to a multiple of 1/1024.
    loss, gradient = _loss_and_gradient(device, np.array([[[[1e4, 1e4 - 0.5]]]]), np.array([[[0]]]))
    yield from _unequal("loss", loss, np.log1p(np.exp(-0.5)))
    probability = 1 / (1 + np.exp(0.5))
    yield from _unequal("gradient", gradient.reshape(2), np.array([-probability, probability]))


@_edge("one class")
def _(device: Device) -> Problems:
    loss, gradient = _loss_and_gradient(device, np.full((1, 2, 2, 1), 7.0), np.zeros((1, 2, 2), np.uint8))
    yield from _unequal("loss", loss, 0)
    yield from _unequal("gradient", gradient, np.zeros_like(gradient))


@_edge("labels of every integer type")
def _(device: Device) -> Problems:
    for kind in (np.uint8, np.int16, np.int32, np.int64, np.uint64):
        loss, _ = _loss_and_gradient(device, np.zeros((1, 1, 3, 4)), np.array([[[0, 3, VOID]]], kind))
        yield from _unequal(f"loss of {np.dtype(kind)} labels", loss, np.log(4))


@_edge("labels that are no class")
def _(device: Device) -> Problems:
    for label in (21, 254, -1, 256, 1000):
        labels = np.zeros((1, 2, 3), np.int64)
        labels[0, 1, 2] = label
        message = f"label {label} at (0, 1, 2) (1 such pixels); expected 0 to 20, or {VOID}"
        yield from _unrefused(device, np.zeros((1, 2, 3, 21)), (labels,), DataError, message)


@_edge("labels, weights and options that do not fit")
def _(device: Device) -> Problems:
    logits, labels = np.zeros((1, 2, 3, 4)), np.zeros((1, 2, 3), np.uint8)
    floats = labels.astype(np.float64)
    yield from _unrefused(device, logits, (floats,), DTypeError, "labels have element type float64; expected integers")
    swapped = labels.reshape(1, 3, 2)
    yield from _unrefused(device, logits, (swapped,), ShapeError, "labels (1, 3, 2) do not fit logits (1, 2, 3, 4)")
    three = np.ones(3)
    yield from _unrefused(device, logits, (labels, three), ShapeError, "class_weights has shape (3,), expected (4,)")
    yield from _unrefused(device, logits, (labels, None, "mean"), ShapeError, "'mean'; expected one of weights, valid")


def _unrefused(
    device: Device,
    logits: np.ndarray,
    arguments: tuple[np.ndarray | str | None, ...],
    error: type[SegnetError],
    message: str,
) -> Problems:
    """A problem unless this error is raised, with these words."""
    attempt = functools.partial(cross_entropy, _tensor(device, logits), *arguments)  # type: ignore[arg-type]
    return unrefused(Refusal("cross_entropy", attempt, error, message))
