"""What two runs with unlike fills (see guards.py) say about a kernel's use of memory."""

from collections.abc import Iterator, Mapping, Sequence
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


def check(name: str, problems: Sequence[str], otherwise: str) -> Check:
    """A property that holds where there is no problem; what is said `otherwise`."""
    return Check(name, not problems, "\n".join(problems) or otherwise)


def check_memory(
    executor: Executor, first: Outcome, second: Outcome, expected: Mapping[str, np.ndarray]
) -> Iterator[Check]:
    """Did the kernel finish; did it write all that it should and nothing else; did it read what it should not?

    `expected` outputs say where a NaN is right; without them it is so only where an input is not finite.
    """
    setup = executor.setup
    fault = first.fault or second.fault or ""
    if "(0 bytes)" in fault and setup.shared == 0:
        fault += "; dynamic shared memory gets its size from --shared BYTES (shared=BYTES)"
    yield check("finished", [fault] * bool(fault), "every thread returned")
    damage = list(dict.fromkeys(first.damage + second.damage))
    yield check("guard zones", damage, "nothing was written outside the arrays")
    inputs = {name: setup.contents[name] for name in setup.of_role("input")}
    held = {name: content.tobytes() for name, content in inputs.items() if content is not None}
    changed = [n for n, was in held.items() if any(run.array(n).tobytes() != was for run in (first, second))]
    yield check("inputs", [f"changed: {', '.join(changed)}"] * bool(changed), "unchanged")
    if not fault:
        untouched = {name: _untouched(setup, name, first, second) for name in setup.of_role("output", "updated")}
        yield check("outputs", [*_unwritten(untouched)], "every element was written")
        reads = [*_dependent(executor, first, second, untouched)]
        reads = reads or [*_without_a_value(setup, first, untouched, expected)]
        yield check("reads", reads, "nothing depends on memory without a value")


def check_variables(executor: Executor) -> list[Check]:
    """Does an output depend on what automatic variables hold before they get a value?

    Nothing where the compiler cannot choose what they hold.
    """
    try:
        zero, pattern = (executor.run(FIRST, HostOptions(workers=1, variables=v)) for v in VARIABLES)
    except CompileError:
        return []
    names = executor.setup.of_role("output", "updated") if zero.fault is None and pattern.fault is None else []
    unlike = {name: zero.unlike(pattern, name) for name in names}
    why = "elements depend on a local variable that is read before it has a value"
    reports = [f"{name}: {found.sum()} of {found.size} {why}" for name, found in unlike.items() if found.any()]
    return [check("variables", reports, "every local variable has a value before it is read")]


def _untouched(setup: Setup, name: str, first: Outcome, second: Outcome) -> np.ndarray:
    """Which elements of an output hold the fill after both runs."""
    if setup.role(name) != "output":
        return np.zeros(1, bool)
    one, other = (fill.of(setup.dtype(name)).reshape(1) for fill in (FIRST, SECOND))
    return (bits(first.array(name)) == bits(one)) & (bits(second.array(name)) == bits(other))


def _some(name: str, elements: np.ndarray, what: str) -> str:
    return f"{name}: {elements.sum()} of {elements.size} elements {what}, the first is {name}[{elements.argmax()}]"


def _unwritten(untouched: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name, elements in untouched.items():
        if elements.all():
            fix = f"if it is an input, make it const, or give it contents: --input {name}=random"
            yield f"{name}: no element was written; {fix}"
        elif elements.any():
            yield _some(name, elements, "were never written")


def _dependent(
    executor: Executor, first: Outcome, second: Outcome, untouched: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Elements that depend on what guard zones, outputs or shared memory held before."""
    third = executor.run(THIRD)
    others: list[list[Outcome]] = []
    for name, not_written in untouched.items():
        unlike = (first.unlike(second, name) | first.unlike(third, name)) & ~not_written
        if not unlike.any():
            continue
        others = others or [[executor.run(fill) for fill in fills] for fills in (OTHER_GUARDS, OTHER_SHARED)]
        of_guards, of_shared = (any(first.unlike(other, name).any() for other in runs) for runs in others)
        why = f"an output is read before it is written (if that is meant, give it contents: --input {name}=random)"
        if of_shared:
            why = "shared memory is read before it is written, as where a __syncthreads() is missing: "
            why += "--orders 6 (orders=6) names it"
        if of_guards:
            why = "an array is read outside its bounds"
        yield f"{_some(name, unlike, 'are not determined')}: {why}"


def _without_a_value(
    setup: Setup, first: Outcome, untouched: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Elements that are NaN although everything that the kernel was given is finite."""
    given = [*setup.scalars.values(), *(a for a in setup.contents.values() if a is not None and is_floating(a.dtype))]
    finite = all(np.isfinite(np.asarray(value, np.float64)).all() for value in given)
    for name in (n for n in untouched if finite and is_floating(setup.dtype(n))):
        nan = np.isnan(first.array(name)) & ~untouched[name]
        if name in expected:
            nan &= ~np.isnan(expected[name].reshape(-1))
        if nan.any():
            why = "a variable or memory is read before it has a value, or the arithmetic gives none"
            may = "if that is right, a --reference says so"
            yield f"{_some(name, nan, 'are NaN')}, and all inputs are finite: {why} ({may})"
