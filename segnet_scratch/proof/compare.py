"""One op on one device against its reference: results within the row's bound, nothing else touched.

Every array of a run lies between guard zones, outputs and workspace are filled with NaN first and with 7e33 in a
second run, and the inputs are compared with what they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.device import Array, Device
from segnet_scratch.kernels import ElementTypes
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.precision import BFLOAT16, is_floating
from segnet_scratch.proof.rows.base import Case, Inputs, Row, empty_outputs

GUARD = 1024  # elements before and after every array
GUARD_BYTE = 0xA5
FILLS = (np.nan, 7e33)  # what outputs hold before the op runs
BFLOAT16_ROUNDING = 2.0**-8  # half a unit of its 8 significant bits, relative


class GuardedArrays:
    """Arrays of a device, each between guard zones."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._buffers: dict[str, Array] = {}

    def add(self, name: str, contents: np.ndarray) -> Array:
        """A device array with these contents."""
        size, guard_bytes = contents.size, GUARD * contents.itemsize
        buffer = np.full(2 * guard_bytes + contents.nbytes, GUARD_BYTE, np.uint8).view(contents.dtype)
        buffer[GUARD : GUARD + size] = contents.reshape(-1)
        self._buffers[name] = self.device.upload(buffer)
        return self._buffers[name][GUARD : GUARD + size].reshape(contents.shape)

    def damaged(self) -> list[str]:
        """Which guard zones were written to: `y: 3 bytes after the end`."""
        reports = []
        for name, buffer in self._buffers.items():
            downloaded = self.device.download(buffer)
            for where, zone in (("before the start", downloaded[:GUARD]), ("after the end", downloaded[-GUARD:])):
                wrong = np.count_nonzero(zone.view(np.uint8) != GUARD_BYTE)
                if wrong:
                    reports.append(f"{name}: {wrong} bytes written {where}")
        return reports


@dataclass
class Run:
    """What came of one run: outputs (and inputs that the op updates) by name, and what went wrong on the way."""

    outputs: dict[str, np.ndarray]
    problems: list[str]


def run_guarded(op: Op, inputs: Mapping[str, np.ndarray | None], device: Device, fill: float = np.nan) -> Run:
    """Runs an op on copies of the inputs, with outputs and workspace holding `fill` (integers: its low byte)."""
    arrays = GuardedArrays(device)
    buffers = {name: None if a is None else arrays.add(name, a) for name, a in inputs.items()}
    for name, s in {**op.outputs, **op.workspace}.items():
        filler = fill if is_floating(s.dtype) else 255 if np.isnan(fill) else 7
        buffers[name] = arrays.add(name, np.full(s.shape, filler, s.dtype))
    op.run(device, Buffers(**buffers))
    device.synchronise()
    problems = arrays.damaged()
    for name, before in inputs.items():
        if before is not None and name not in op.updates and not same_bits(before, device.download(buffers[name])):
            problems.append(f"{name}: the input was changed")
    return Run({name: device.download(buffers[name]) for name in (*op.outputs, *op.updates)}, problems)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Are the two arrays equal in shape, type and every bit? A NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def reference(row: Row, case: Case, inputs: Inputs) -> tuple[Op, Buffers, dict[str, np.ndarray]]:
    """The reference evaluated in float64: its op, its inputs beside its outputs, and all results by name."""
    op = row.reference_plan(case)
    wide = {
        name: None if a is None else row.as_seen(name, a).astype(op.inputs[name].dtype) for name, a in inputs.items()
    }
    outputs = empty_outputs(op)
    updated = {name: np.copy(wide[name]) for name in op.updates}  # type: ignore[arg-type]
    op.reference(Buffers(**{**wide, **updated}, **outputs))
    return op, Buffers(**wide, **outputs), {**outputs, **updated}


def check(
    row: Row,
    case: Case,
    device: Device,
    rng: np.random.Generator,
    dtype: DTypeLike | None = None,
    integers: bool = False,
) -> list[str]:
    """What is wrong with an op on a device, for arrays of `dtype` (the row's first unless given); hopefully nothing.

    With `integers` the results must equal the reference's, without it they must lie within the row's bound.
    """
    dtype = row.elements[0] if dtype is None else np.dtype(dtype)
    op = row.plan(case, dtype)
    inputs = row.inputs(op, case, rng, integers)
    first, second = (run_guarded(op, inputs, device, fill) for fill in FILLS)
    problems = first.problems + second.problems
    wide, b, expected = reference(row, case, inputs)
    sums = np.finfo(ElementTypes.of(dtype).accumulate)
    # In float64 the reference has rounding errors of its own, as large as those of the op.
    eps = float(sums.eps) * (2 if dtype == np.float64 else 1)
    # Below the smallest normal number precision fades, and a GPU may flush to 0.
    tiny = 4 * float(sums.tiny)
    bounds = {} if integers else {name: bound + tiny for name, bound in row.bound(wide, b, eps).items()}
    for name, got in first.outputs.items():
        if not same_bits(got, second.outputs[name]):
            problems.append(f"{name}: depends on what the output held before")
        wanted, bound = expected[name], bounds.get(name, 0.0)
        if got.dtype == BFLOAT16 and wanted.dtype != BFLOAT16:
            if integers:  # the exact sum has one nearest bfloat16
                wanted = wanted.astype(BFLOAT16)
            else:
                bound = bound + BFLOAT16_ROUNDING * (np.abs(wanted) + bound)
        problems += deviations(name, got, wanted, bound)
    return [f"{row.name} on {device.name}, {dtype}, {case}: {problem}" for problem in problems]


def deviations(name: str, got: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> list[str]:
    """A report on the worst element that is further from the expected value than allowed; NaN is never allowed."""
    if got.shape != expected.shape:
        return [f"{name}: has shape {got.shape}, expected {expected.shape}"]
    if not is_floating(got.dtype):
        wrong = got != expected
        excess = wrong.astype(np.float64)
    else:
        error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
        wrong = ~(error <= bound)
        excess = np.where(np.isnan(error), np.inf, error - bound)
    if not wrong.any():
        return []
    where = np.unravel_index(int(np.argmax(np.where(wrong, excess, -np.inf))), got.shape)
    allowed = np.broadcast_to(bound, got.shape)[where]
    return [
        f"{name}: {np.count_nonzero(wrong)} of {got.size} elements are wrong, worst {tuple(int(i) for i in where)}: "
        f"got {got[where]!r}, expected {expected[where]!r} +- {allowed:.3g}"
    ]
