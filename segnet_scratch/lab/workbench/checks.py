"""What two runs with unlike fills (see guards.py) say about a kernel's use of memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.workbench.execution import Executor, Outcome
from segnet_scratch.lab.workbench.guards import FIRST, OTHER_GUARDS, OTHER_SHARED, SECOND, THIRD, bits
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.runtime.host import VARIABLES, HostOptions
from segnet_scratch.runtime.precision import is_floating


@dataclass(frozen=True)
class Check:
    """One property of the run: did it hold, and what was seen."""

    name: str
    passed: bool
    message: str


def check_memory(
    executor: Executor, first: Outcome, second: Outcome, expected: Mapping[str, np.ndarray] | None = None
) -> list[Check]:
    """Did the kernel finish; did it write all that it should and nothing else; did it read what it should not?

    `expected` outputs say where a NaN is right; without them it is so only where an input is not finite.
    """
    setup = executor.setup
    fault = first.fault or second.fault
    if fault is not None and "(0 bytes)" in fault and setup.shared == 0:
        fault += "; dynamic shared memory gets its size from --shared BYTES (shared=BYTES)"
    damage = list(dict.fromkeys(first.damage + second.damage))
    changed = [name for name in setup.of_role("input") if _changed(setup, name, first) or _changed(setup, name, second)]
    checks = [
        Check("finished", fault is None, fault or "every thread returned"),
        Check("guard zones", not damage, "\n".join(damage) or "nothing was written outside the arrays"),
        Check("inputs", not changed, f"changed: {', '.join(changed)}" if changed else "unchanged"),
    ]
    if fault is None:
        unwritten = _unwritten(setup, first, second)
        dependent = _dependent(executor, first, second) or _without_a_value(setup, first, second, expected or {})
        checks.append(Check("outputs", not unwritten, "\n".join(unwritten) or "every element was written"))
        checks.append(
            Check("reads", not dependent, "\n".join(dependent) or "nothing depends on memory without a value")
        )
    return checks


def check_variables(executor: Executor) -> list[Check]:
    """Does an output depend on what automatic variables hold before they get a value?

    Nothing where the compiler cannot choose what they hold.
    """
    try:
        zero, pattern = (executor.run(FIRST, HostOptions(workers=1, variables=v)) for v in VARIABLES)
    except CompileError:
        return []
    reports = [
        f"{name}: {zero.unlike(pattern, name).sum()} of {zero.array(name).size} elements depend on a local variable "
        "that is read before it has a value"
        for name in executor.setup.of_role("output", "updated")
        if zero.fault is None and pattern.fault is None and zero.unlike(pattern, name).any()
    ]
    return [Check("variables", not reports, "\n".join(reports) or "every local variable has a value before it is read")]


def _changed(setup: Setup, name: str, outcome: Outcome) -> bool:
    content = setup.contents[name]
    return content is not None and outcome.array(name).tobytes() != content.tobytes()


def _untouched(setup: Setup, name: str, first: Outcome, second: Outcome) -> np.ndarray:
    """Which elements of an output hold the fill after both runs."""
    if setup.role(name) != "output":
        return np.zeros(1, bool)
    one, other = (fill.of(setup.dtype(name)).reshape(1) for fill in (FIRST, SECOND))
    return (bits(first.array(name)) == bits(one)) & (bits(second.array(name)) == bits(other))


def _some(name: str, elements: np.ndarray, what: str) -> str:
    return f"{name}: {elements.sum()} of {elements.size} elements {what}, the first is {name}[{elements.argmax()}]"


def _unwritten(setup: Setup, first: Outcome, second: Outcome) -> list[str]:
    reports = []
    for name in setup.of_role("output"):
        untouched = _untouched(setup, name, first, second)
        if untouched.all():
            reports.append(
                f"{name}: no element was written; if it is an input, make it const, or give it contents: "
                f"--input {name}=random"
            )
        elif untouched.any():
            reports.append(_some(name, untouched, "were never written"))
    return reports


def _dependent(executor: Executor, first: Outcome, second: Outcome) -> list[str]:
    """Elements that depend on what guard zones, outputs or shared memory held before."""
    setup = executor.setup
    reports = []
    third = executor.run(THIRD)
    others: list[list[Outcome]] = []
    for name in setup.of_role("output", "updated"):
        unlike = first.unlike(second, name) | first.unlike(third, name)
        unlike &= ~_untouched(setup, name, first, second)
        if not unlike.any():
            continue
        others = others or [[executor.run(fill) for fill in fills] for fills in (OTHER_GUARDS, OTHER_SHARED)]
        of_guards, of_shared = (any(first.unlike(other, name).any() for other in runs) for runs in others)
        why = (
            "an array is read outside its bounds"
            if of_guards
            else f"shared memory is read before it is written{_BARRIER}"
            if of_shared
            else f"an output is read before it is written (if that is meant, give it contents: --input {name}=random)"
        )
        reports.append(f"{_some(name, unlike, 'are not determined')}: {why}")
    return reports


_BARRIER = ", as where a __syncthreads() is missing: --orders 6 (orders=6) names it"


def _without_a_value(setup: Setup, first: Outcome, second: Outcome, expected: Mapping[str, np.ndarray]) -> list[str]:
    """Elements that are NaN although everything that the kernel was given is finite."""
    given = [*setup.scalars.values(), *(a for a in setup.contents.values() if a is not None and is_floating(a.dtype))]
    if not all(np.isfinite(np.asarray(value, np.float64)).all() for value in given):
        return []
    reports = []
    for name in setup.of_role("output", "updated"):
        got = first.array(name)
        if not is_floating(got.dtype):
            continue
        nan = np.isnan(got) & ~_untouched(setup, name, first, second)
        if name in expected:
            nan &= ~np.isnan(expected[name].reshape(-1))
        if nan.any():
            reports.append(
                f"{_some(name, nan, 'are NaN')}, and all inputs are finite: a variable or memory is read before it has "
                "a value, or the arithmetic gives none (if that is right, a --reference says so)"
            )
    return reports
