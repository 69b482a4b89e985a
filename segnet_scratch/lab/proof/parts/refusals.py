"""What must be refused, with the error expected for each, and what looks as if: a valid result or a named error.

Plans and calls that do not fit, of every row. Hostile inputs of pooling and its like: NaN, infinities, ties, codes that
point nowhere, odd sizes, held against a definition by loops (ops/by_hand.py). The edges of the loss: nothing to
average, logits that overflow an exponential, labels that are no class; what is expected there was derived by hand.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.errors import DataError, DTypeError, SegnetError, ShapeError
from segnet_scratch.lab.proof.compare import deviations, run_guarded
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.table import row_named
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.ops.cases import Hostile, Inputs, Refusal
from segnet_scratch.ops.loss.cross_entropy import NORMALISATIONS
from segnet_scratch.ops.op import VOID, Buffers, Op
from segnet_scratch.runtime.devices import Array, Device

MISFIT = 8  # one input in so many does not fit the plan at all


class Refusals(Part):
    """Plans by the list of the row, element types and calls of every row alike."""

    name = "refusals"
    proves = "inputs that do not fit meet the error of their row, by name"

    def targets(self, rows: Rows) -> Sequence[str]:
        return [row.name for row in rows]

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        row = row_named(work.target)
        tally.counts["rows"] += 1
        types = (np.float16, np.int32, np.complex64, np.bool_)
        plans = {np.dtype(dtype).name: functools.partial(row.plan, row.cases()[0], dtype) for dtype in types}
        of_types = [Refusal(dtype, plan, DTypeError, "expected float32") for dtype, plan in plans.items()]
        for refusal in [*row.refusals(), *of_types]:
            tally.counts["plans"] += 1
            yield from unrefused(refusal)
        case = min(row.cases()[1:], key=lambda case: row.plan(case, row.elements[0]).bytes)
        op = row.plan(case, row.elements[0])
        inputs = row.inputs(op, case, row.generator(work.seed, 0))
        with tally.attempt(work, f"{case}, a call that fits"):
            op(device, **{name: None if a is None else device.upload(a.copy()) for name, a in inputs.items()})
        for refusal in _wrong_calls(op, inputs, device):
            tally.counts["calls"] += 1
            yield from unrefused(refusal)


def unrefused(refusal: Refusal) -> Iterator[str]:
    """A problem unless the error is raised, with the words, that are expected."""
    try:
        refusal.attempt()
    except refusal.error as error:
        if refusal.message not in str(error):
            yield f"{refusal.reason}: the error says {error}; expected {refusal.message}"
    except Exception as error:  # a traceback of another kind is a failure, too
        yield f"{refusal.reason}: {type(error).__name__}: {error}; expected {refusal.error.__name__}"
    else:
        yield f"{refusal.reason}: it was taken; expected {refusal.error.__name__}: {refusal.message}"


def _wrong_calls(op: Op, inputs: Inputs, device: Device) -> Iterator[Refusal]:
    """Calls with an array that is missing, too much, or not what was planned."""
    good = {name: None if a is None else device.upload(a) for name, a in inputs.items()}
    first, *others = good

    def with_another(name: str, array: Array | None) -> functools.partial[Buffers]:
        return functools.partial(op, device, **{**good, name: array})

    missing = functools.partial(op, device, **{name: good[name] for name in others})
    yield Refusal("an array missing", missing, ShapeError, f"{op.name}: takes ")
    yield Refusal("an array too much", with_another("another", good[first]), ShapeError, f"{op.name}: takes ")
    for name, array in ((name, a) for name, a in inputs.items() if a is not None):
        place, wrong = f"{op.name}: {name}", functools.partial(with_another, name)
        five = wrong(device.upload(array.reshape(-1, 1, 1, 1, 1)))
        yield Refusal(f"{name} of five dimensions", five, ShapeError, f"{place} has shape")
        cast = wrong(device.upload(array.astype(np.float64 if array.dtype != np.float64 else np.float32)))
        yield Refusal(f"{name} of another type", cast, DTypeError, f"{place} has element type")
        if name not in op.optional:
            yield Refusal(f"{name} is None", wrong(None), ShapeError, f"{place} is None")
        if array.size > 1:
            view = wrong(device.upload(np.repeat(array, 2, axis=-1))[..., ::2])
            yield Refusal(f"{name} is a view", view, ShapeError, f"{place} is a view")


class HostileInputs(Part):
    """For the rows that say what hostile inputs are."""

    name = "hostile"
    proves = "NaN, infinity, ties, codes out of range: a valid result or a named error"

    def targets(self, rows: Rows) -> Sequence[str]:
        with np.errstate(all="ignore"):
            return [row.name for row in rows if row.hostile(np.random.default_rng(0)) is not None]

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        row = row_named(work.target)
        tally.counts["rows"] += 1
        for index in range(work.effort.hostile):
            rng = row.generator(work.seed, index, 2)
            hostile = row.hostile(rng)
            assert hostile is not None
            shapes = " ".join(f"{name}={a.shape}" for name, a in hostile.inputs.items() if a is not None)
            where = f"{shapes.replace(', ', ',')}, input {index} of seed {work.seed}"
            misfit = index % MISFIT == MISFIT - 1
            tally.counts["misfits" if misfit else "inputs"] += 1
            with tally.attempt(work, where):
                problems = _misfit_problems(hostile, device, rng) if misfit else _result_problems(hostile, device)
                yield from (f"{where}: {problem}" for problem in problems)


def _result_problems(hostile: Hostile, device: Device) -> list[object]:
    run = run_guarded(hostile.op, hostile.inputs, device)
    found = [deviations(name, run.outputs[name], wanted, 0.0, same=True) for name, wanted in hostile.expected.items()]
    return [*run.defects, *(defect for defects in found for defect in defects)]


def _misfit_problems(hostile: Hostile, device: Device, rng: np.random.Generator) -> Iterator[str]:
    """An input of another type, or with a row too many, must be refused before anything runs."""
    arrays = {name: None if a is None else device.upload(a) for name, a in hostile.inputs.items()}
    name = str(rng.choice(list(arrays)))
    original = hostile.inputs[name]
    assert original is not None
    expected: type[SegnetError] = DTypeError if rng.integers(2) else ShapeError
    wrong = original.astype(np.int64) if expected is DTypeError else np.concatenate([original, original[:1]])
    arrays[name] = device.upload(wrong)
    return unrefused(Refusal(f"misfit of {name}", functools.partial(hostile.op, device, **arrays), expected, name))


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
