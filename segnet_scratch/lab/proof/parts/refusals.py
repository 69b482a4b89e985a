"""What every row must refuse, with the error expected for each: plans and calls that do not fit."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.table import row_named
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.ops.cases import Inputs, Refusal
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.runtime.devices import Array, Device


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
