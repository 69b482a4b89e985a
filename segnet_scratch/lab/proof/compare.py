"""One op on one device against its reference: results within the row's bound, nothing else touched.

Every array of a run lies between guard zones (lab/workbench/guards.py), outputs and workspace are filled with NaN
first and with a number in a second run, in which guard zones hold other values, and inputs are compared with what they
were.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.lab.workbench.guards import FIRST, SECOND, Fill, GuardedArrays, bits
from segnet_scratch.lab.workbench.reference import worst_element
from segnet_scratch.ops.cases import Case, Inputs, Row, empty_outputs
from segnet_scratch.ops.convolution.split_planes import joined
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.precision import BFLOAT16, BFLOAT16_ROUNDING


@dataclass(frozen=True)
class Defect:
    """What is wrong with an array.

    `element` is the worst where values are wrong; `memory` says that an access is wrong: outside of an array, or of
    what nobody has written.
    """

    array: str
    text: str
    element: tuple[int, ...] | None = None
    memory: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass
class GuardedRun:
    """What came of one run: outputs (and inputs that the op updates) by name, and what went wrong on the way."""

    outputs: dict[str, np.ndarray]
    defects: list[Defect]
    guarded: int  # arrays between guard zones

    def unlike(self, other: "GuardedRun") -> tuple[str, tuple[int, ...]] | None:
        """The first output, and the first element of it, that has other bits after the other run."""
        for name, output in self.outputs.items():
            if not same_bits(output, other.outputs[name]):
                unlike = bits(output.reshape(-1)) != bits(other.outputs[name].reshape(-1))
                return name, tuple(int(i) for i in np.unravel_index(int(unlike.argmax()), output.shape))
        return None


def run_guarded(op: Op, inputs: Mapping[str, np.ndarray | None], device: Device, fill: Fill = FIRST) -> GuardedRun:
    """Runs an op on copies of the inputs; memory without a value holds `fill`."""
    arrays = GuardedArrays(device, fill)
    buffers = {name: None if a is None else arrays.add(name, a, a.shape, a.dtype) for name, a in inputs.items()}
    for name, s in {**op.outputs, **op.workspace}.items():
        buffers[name] = arrays.add(name, None, s.shape, s.dtype)
    arrays.forbid()
    try:
        op.run(device, Buffers(**buffers))
        device.synchronise()
    finally:
        reports = arrays.damage()
    defects = [Defect(name, report, memory=True) for name in reports for report in reports[name]]
    for name, before in inputs.items():
        if before is not None and name not in op.updates and not same_bits(before, device.download(buffers[name])):
            defects.append(Defect(name, f"{name}: the input was changed", memory=True))
    outputs = {name: device.download(buffers[name]) for name in (*op.outputs, *op.updates)}
    return GuardedRun(outputs, defects, len(arrays))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Are the two arrays equal in shape, type and every bit? A NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


Expectation = dict[str, tuple[np.ndarray, np.ndarray | float]]  # by output: what it must be, and how far it may be off


def expectation(row: Row, case: Case, inputs: Inputs, dtype: np.dtype, integers: bool = False) -> Expectation:
    """What `examine` compares with: the reference for these inputs, evaluated in float64. It needs no device."""
    op = row.reference_plan(case)
    given = {name: a for name, a in inputs.items() if a is not None}
    wide = dict.fromkeys(inputs) | {n: row.as_seen(n, a).astype(op.inputs[n].dtype) for n, a in given.items()}
    outputs, updated = empty_outputs(op), {name: np.copy(wide[name]) for name in op.updates}
    op.reference(Buffers(**{**wide, **updated}, **outputs))
    sums = np.finfo(ElementTypes.of(dtype).accumulate)
    # In float64 the reference has rounding errors of its own, as large as those of the op.
    eps = float(sums.eps) * (2 if dtype == np.float64 else 1)
    # Below the smallest normal number precision fades, and a GPU may flush to 0.
    tiny = 4 * float(sums.tiny)
    bounds = {} if integers else row.bound(op, Buffers(**wide, **outputs), eps)
    expected = {**outputs, **updated}
    return {name: (wanted, bounds[name] + tiny if name in bounds else 0.0) for name, wanted in expected.items()}


@dataclass(frozen=True)
class Examination:
    """An op on a device, run twice with unlike fills."""

    op: Op
    inputs: Inputs
    defects: list[Defect]
    guarded: int  # arrays that lay between guard zones, over both runs


def examine(
    row: Row,
    case: Case,
    device: Device,
    rng: np.random.Generator,
    dtype: DTypeLike | None = None,
    integers: bool = False,
) -> Examination:
    """Runs an op and compares it with its reference, for arrays of `dtype` (the row's first unless given).

    With `integers` the results must equal the reference's, without it they must lie within the row's bound.
    """
    dtype = row.elements[0] if dtype is None else np.dtype(dtype)
    op = row.plan(case, dtype)
    inputs = row.inputs(op, case, rng, integers)
    first, second = (run_guarded(op, inputs, device, fill) for fill in (FIRST, SECOND))
    defects = first.defects + second.defects
    expected = expectation(row, case, inputs, dtype, integers)
    for name, got in first.outputs.items():
        if not same_bits(got, second.outputs[name]):
            what = f"{name}: depends on what the output held before, or on what lies beside an array"
            defects.append(Defect(name, what, memory=True))
        wanted, bound = expected[name]
        if got.dtype == BFLOAT16 and wanted.dtype != BFLOAT16:
            planes = row.planes(op, name)
            got, wanted = (joined(array, planes, np.float64) for array in (got, wanted))
            if integers:  # the exact sum has one nearest bfloat16
                wanted = wanted.astype(BFLOAT16)
            else:
                bound = bound + BFLOAT16_ROUNDING**planes * (np.abs(wanted) + bound)
        defects += deviations(name, got, wanted, bound)
    return Examination(op, inputs, defects, first.guarded + second.guarded)


def deviations(
    name: str, got: np.ndarray, expected: np.ndarray, bound: np.ndarray | float, same: bool = False
) -> list[Defect]:
    """A report on the worst element that is further from the expected value than allowed; see `worst_element`."""
    if got.shape != expected.shape:
        return [Defect(name, f"{name}: has shape {got.shape}, expected {expected.shape}")]
    count, at = worst_element(got, expected, bound, same)
    if not count:
        return []
    values = f"{got[at]}, expected {expected[at]} +- {np.broadcast_to(bound, got.shape)[at]:.3g}"
    return [Defect(name, f"{name}: {count} of {got.size} elements are wrong; worst {name}{list(at)} = {values}", at)]
