"""What two runs with unlike fills (see guards.py) say about a kernel's use of memory."""

import numpy as np

from segnet_scratch.lab.workbench.execution import Executor, Outcome
from segnet_scratch.lab.workbench.guards import FIRST, OTHER_GUARDS, SECOND, Fill
from segnet_scratch.lab.workbench.result import Check
from segnet_scratch.lab.workbench.setup import Setup


def check_memory(executor: Executor, first: Outcome, second: Outcome) -> list[Check]:
    """Did the kernel finish; did it write all that it should and nothing else; did it read what it should not?"""
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
        dependent = _dependent(executor, first, second)
        checks.append(Check("outputs", not unwritten, "\n".join(unwritten) or "every element was written"))
        checks.append(
            Check("reads", not dependent, "\n".join(dependent) or "nothing depends on memory without a value")
        )
    return checks


def _changed(setup: Setup, name: str, outcome: Outcome) -> bool:
    content = setup.contents[name]
    return content is not None and outcome.array(name).tobytes() != content.tobytes()


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _is_fill(array: np.ndarray, fill: Fill) -> np.ndarray:
    return _bits(array) == _bits(fill.of(array.dtype).reshape(1))


def _untouched(setup: Setup, name: str, first: Outcome, second: Outcome) -> np.ndarray:
    """Which elements of an output hold the fill after both runs."""
    if setup.role(name) != "output":
        return np.zeros(1, bool)
    return _is_fill(first.array(name), FIRST) & _is_fill(second.array(name), SECOND)


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
            count, where = int(untouched.sum()), int(untouched.argmax())
            reports.append(
                f"{name}: {count} of {untouched.size} elements were never written, the first is {name}[{where}]"
            )
    return reports


def _dependent(executor: Executor, first: Outcome, second: Outcome) -> list[str]:
    """Elements that depend on what guard zones or outputs held before."""
    setup = executor.setup
    reports = []
    third: Outcome | None = None
    for name in setup.of_role("output", "updated"):
        unlike = _bits(first.array(name)) != _bits(second.array(name))
        unlike &= ~_untouched(setup, name, first, second)
        if not unlike.any():
            continue
        third = third or executor.run(OTHER_GUARDS)
        of_guards = _bits(first.array(name)) != _bits(third.array(name))
        why = (
            "an array is read outside its bounds"
            if of_guards.any()
            else f"an output is read before it is written (if that is meant, give it contents: --input {name}=random)"
        )
        count, where = int(unlike.sum()), int(unlike.argmax())
        reports.append(
            f"{name}: {count} of {unlike.size} elements are not determined, the first is {name}[{where}]: {why}"
        )
    return reports
