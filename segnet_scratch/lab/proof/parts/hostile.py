"""Hostile inputs of pooling and its like: NaN, infinities, ties, codes that point nowhere, odd sizes, wrong arrays.

Each has a valid result, the one of a definition by loops (rows/by_hand.py), or a named error.
"""

from collections.abc import Iterator

import numpy as np

from segnet_scratch.errors import DTypeError, SegnetError, ShapeError
from segnet_scratch.lab.proof.compare import run_guarded
from segnet_scratch.lab.proof.parts.base import Part
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.ops.cases import Hostile, Row
from segnet_scratch.runtime.devices import Device

MISFIT = 8  # one input in so many does not fit the plan at all


class HostileInputs(Part):
    """For the rows that say what hostile inputs are."""

    name = "hostile"
    proves = "NaN, infinity, ties, codes out of range: a valid result or a named error"

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
        for row in rows:
            with np.errstate(all="ignore"):
                hostile = row.hostile(np.random.default_rng(seed))
            if hostile is not None:
                yield Work(self.name, device, row.name, 0, effort.hostile, seed, effort)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        row = row_named(work.target)
        tally.counts["rows"] += 1
        for index in range(work.first, work.first + work.count):
            rng = row.generator(work.seed, index, 2)
            hostile = row.hostile(rng)
            assert hostile is not None
            shapes = " ".join(f"{name}={a.shape}" for name, a in hostile.inputs.items() if a is not None)
            where = f"{shapes.replace(', ', ',')}, input {index} of seed {work.seed}"
            misfit = index % MISFIT == MISFIT - 1
            tally.counts["misfits" if misfit else "inputs"] += 1
            with tally.attempt(work, row.name, where):
                problems = _misfit_problems(hostile, device, rng) if misfit else _result_problems(hostile, device)
                yield from (f"{where}: {problem}" for problem in problems)


def _result_problems(hostile: Hostile, device: Device) -> list[str]:
    run = run_guarded(hostile.op, hostile.inputs, device)
    problems = [str(problem) for problem in run.problems]
    for name, expected in hostile.expected.items():
        got = run.outputs[name]
        wrong = ~((got == expected) | ((got != got) & (expected != expected)))
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            problems.append(f"{name}{list(where)} is {got[where]}, expected {expected[where]}")
    return problems


def _misfit_problems(hostile: Hostile, device: Device, rng: np.random.Generator) -> list[str]:
    """An input of another type, or with a row too many, must be refused before anything runs."""
    arrays = {name: None if a is None else device.upload(a) for name, a in hostile.inputs.items()}
    name = str(rng.choice(list(arrays)))
    original = hostile.inputs[name]
    assert original is not None
    expected: type[SegnetError] = DTypeError if rng.integers(2) else ShapeError
    wrong = original.astype(np.int64) if expected is DTypeError else np.concatenate([original, original[:1]])
    arrays[name] = device.upload(wrong)
    try:
        hostile.op(device, **arrays)
    except (DTypeError, ShapeError) as error:
        return [] if type(error) is expected and name in str(error) else [f"{type(error).__name__}: {error}"]
    return [f"{name} does not fit the plan, and the op ran; expected {expected.__name__}"]
