"""Hostile inputs of pooling and its like: NaN, infinities, ties, codes that point nowhere, odd sizes, wrong arrays.

Each has a valid result, the one of a definition by loops (ops/by_hand.py), or a named error.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from segnet_scratch.errors import DTypeError, SegnetError, ShapeError
from segnet_scratch.lab.proof.compare import deviations, run_guarded
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.parts.refusals import unrefused
from segnet_scratch.lab.proof.table import row_named
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.ops.cases import Hostile, Refusal
from segnet_scratch.runtime.devices import Device

MISFIT = 8  # one input in so many does not fit the plan at all


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
