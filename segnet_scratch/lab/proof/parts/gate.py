"""The launch gate refuses misuse of every kernel, and launches nothing."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from segnet_scratch.lab.proof.launches import kernels_of
from segnet_scratch.lab.proof.misuse import MISUSES, NOT_APPLICABLE, SENTINEL, Attempt, Call, DryDevice, valid_call
from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import find_kernel, shipped_kernels

KINDS = 12  # of misuse of each kernel, at least


class Gate(Part):
    """What the gate looks at is the same on every device, so this needs none: launches are noted, not carried out."""

    name = "gate"
    proves = "a wrong launch is refused with a named error, and nothing runs"
    devices = ("any",)

    def targets(self, rows: Rows) -> Sequence[str]:
        return sorted(shipped_kernels() if rows is ROWS else set().union(*map(kernels_of, rows)))

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        tally.counts["kernels"] += 1
        right = valid_call(find_kernel(work.target))
        kinds = 0
        for kind, misuse in MISUSES.items():
            attempts = list(misuse(right))
            kinds += bool(attempts)
            tally.counts["misuses"] += len(attempts)
            if not attempts and kind not in NOT_APPLICABLE:
                yield f"{kind}: there is no such misuse of this kernel; expected one at least"
            for attempt in attempts:
                yield from (f"{kind}: {problem}" for problem in refusal_problems(right, attempt))
        tally.counts["kinds of misuse"] += kinds
        if kinds < KINDS:
            yield f"{kinds} kinds of misuse; expected {KINDS} at least"

    def ran(self, tally: Tally) -> str:
        kernels = max(tally.counts["kernels"], 1)
        each = tally.counts["kinds of misuse"] / kernels
        return f"{kernels} kernels, {tally.counts['misuses']:,} wrong launches of {each:.1f} kinds on average"


def refusal_problems(right: Call, attempt: Attempt) -> list[str]:
    """What is wrong with the gate's answer to a wrong call."""
    wrong, error, named = attempt
    device, problems = DryDevice(), []
    caught: Exception | None = None
    try:
        wrong.launch(device)
    except Exception as raised:  # a traceback of another kind is a failure, too
        caught = raised
    message = f"{type(caught).__name__}: {caught}" if caught else "no error"
    if type(caught) is not error:
        problems.append(f"{message}; expected {error.__name__}")
    elif not str(caught).startswith(f"{right.kernel.name}: ") or not re.search(rf"\b{named}\b", str(caught)):
        problems.append(f"{message}; expected {right.kernel.name} and {named} to be named")
    if device.launches:
        problems.append("something was launched")
    if any((array.view(np.uint8) != SENTINEL).any() for _, array in right.of("arrays")):
        problems.append("an array was changed")
    return problems
