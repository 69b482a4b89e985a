"""What every row must refuse, with the error expected for each: plans and calls that do not fit."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from segnet_scratch.errors import DTypeError, SegnetError, ShapeError
from segnet_scratch.lab.proof.parts.base import Part
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.ops.cases import Inputs, Refusal, Row
from segnet_scratch.ops.op import Op
from segnet_scratch.runtime.devices import Device

Call = tuple[str, dict[str, Any], type[SegnetError], str]  # what is wrong, the arrays, the error, how it begins


class Refusals(Part):
    """Plans by the list of the row, element types and calls of every row alike."""

    name = "refusals"
    proves = "inputs that do not fit meet the error of their row, by name"

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
        for row in rows:
            yield Work(self.name, device, row.name, seed=seed, effort=effort)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        row = row_named(work.target)
        tally.counts["rows"] += 1
        for refusal in [*row.refusals(), *_element_types(row)]:
            tally.counts["plans"] += 1
            yield from unrefused(refusal)
        case = min(row.cases()[1:], key=lambda case: row.plan(case, row.elements[0]).bytes)
        op = row.plan(case, row.elements[0])
        inputs = row.inputs(op, case, row.generator(work.seed, 0))
        with tally.attempt(work, row.name, f"{case}, a call that fits"):
            op(device, **{name: None if a is None else device.upload(a.copy()) for name, a in inputs.items()})
        for reason, arrays, error, begin in _wrong_calls(op, inputs, device):
            tally.counts["calls"] += 1
            attempt = functools.partial(op, device, **arrays)
            yield from unrefused(Refusal(reason, attempt, error, f"{op.name}: {begin}"))


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


def _element_types(row: Row) -> Iterator[Refusal]:
    case = row.cases()[0]
    for dtype in (np.float16, np.int32, np.complex64, np.bool_):
        attempt = functools.partial(row.plan, case, dtype)
        yield Refusal(np.dtype(dtype).name, attempt, DTypeError, "expected float32")


def _wrong_calls(op: Op, inputs: Inputs, device: Device) -> Iterator[Call]:
    """Calls with an array that is missing, too much, or not what was planned."""
    good = {name: None if a is None else device.upload(a) for name, a in inputs.items()}
    first = next(iter(good))
    yield "an array missing", {name: a for name, a in good.items() if name != first}, ShapeError, "takes "
    yield "an array too much", {**good, "another": good[first]}, ShapeError, "takes "
    for name, array in inputs.items():
        if array is None:
            continue
        other = np.float64 if array.dtype != np.float64 else np.float32
        five = device.upload(array.reshape(-1, 1, 1, 1, 1))
        yield f"{name} of five dimensions", {**good, name: five}, ShapeError, f"{name} has shape"
        cast = device.upload(array.astype(other))
        yield f"{name} of another type", {**good, name: cast}, DTypeError, f"{name} has element type"
        if name not in op.optional:
            yield f"{name} is None", {**good, name: None}, ShapeError, f"{name} is None"
        if array.size > 1:
            doubled = device.upload(np.repeat(array, 2, axis=-1))[..., ::2]
            yield f"{name} is a view", {**good, name: doubled}, ShapeError, f"{name} is a view"
