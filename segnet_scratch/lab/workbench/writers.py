"""Finds out who writes an element, by running a kernel with some of its threads (or blocks) left out.

Work is numbered: by thread of the grid, or by block for kernels whose threads meet at barriers, because a block with
threads missing would wait for ever. Any two unlike numbers differ in at least one bit; so for each bit the work is cut
into the half with a 0 there and the half with a 1, and each half runs alone.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import numpy as np

from segnet_scratch.lab.workbench.execution import Executor, Outcome
from segnet_scratch.lab.workbench.guards import FIRST
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.signature import blank_comments

_ASCENDING = HostOptions(workers=1)
Part = tuple[int, int]  # mask and value: the numbers n with n & mask == value


def find_conflict(executor: Executor, whole: Outcome) -> tuple[str, int] | None:
    """(array, element) of an element that two threads write, and not the same value; `whole` is a complete run.

    None as well for a file with atomic operations, which allow exactly that.
    """
    setup = executor.setup
    if "atomic" in blank_comments(setup.kernel.source.text):
        return None
    for bit in range(_bits(setup)):
        halves = [executor.run(FIRST, replace(_ASCENDING, part=(1 << bit, value << bit))) for value in (0, 1)]
        if any(half.fault for half in halves):
            return None
        for name in setup.of_role("output", "updated"):
            a, b = (half.array(name) for half in halves)
            both = _written(setup, name, a) & _written(setup, name, b)
            both &= _unlike(a, b) | _unlike(a, whole.array(name))
            if both.any():
                return name, int(both.argmax())
    return None


def describe_writers(executor: Executor, array: str, element: int) -> list[str]:
    """Names one writer of an element, or two where there are several; nothing where they cannot be told."""
    setup = executor.setup

    def writes(part: Part) -> bool:
        outcome = executor.run(FIRST, replace(_ASCENDING, part=part))
        return outcome.fault is None and bool(_written(setup, array, outcome.array(array))[element])

    bits, name = _bits(setup), element_name(setup, array, element)
    first = _writer(writes, (0, 0), bits)
    if first is None:
        return []
    for bit in range(bits):
        other_half = (1 << bit, ~first & 1 << bit)
        if writes(other_half):
            second = _writer(writes, other_half, bits)
            if second is not None:
                return [f"{name} is written by {_who(setup, first)} and by {_who(setup, second)}"]
    return [f"{name} is written by {_who(setup, first)} alone"]


def element_name(setup: Setup, array: str, element: int) -> str:
    """`y[1, 0, 3]`."""
    index = np.unravel_index(element, setup.shapes[array])
    return f"{array}[{', '.join(str(int(i)) for i in index)}]"


def _writer(writes: Callable[[Part], bool], part: Part, bits: int) -> int | None:
    """The number of one thread or block of the part that writes; None where only several together do."""
    mask, value = part
    for bit in reversed(range(bits)):
        if mask & 1 << bit:
            continue
        mask |= 1 << bit
        if not writes((mask, value)):
            value |= 1 << bit
    return value if writes((mask, value)) else None


def _bits(setup: Setup) -> int:
    work = setup.blocks if setup.kernel.cooperative else setup.blocks * prod(setup.block)
    return (work - 1).bit_length()


def _written(setup: Setup, name: str, array: np.ndarray) -> np.ndarray:
    """Which elements do not hold what they held before."""
    content = setup.contents.get(name)
    before = np.broadcast_to(FIRST.of(array.dtype), array.shape) if content is None else content.reshape(-1)
    return _unlike(array, np.ascontiguousarray(before))


def _unlike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = f"u{a.dtype.itemsize}"
    return a.view(bits) != b.view(bits)


def _who(setup: Setup, number: int) -> str:
    if setup.kernel.cooperative:
        return f"block {_place(number, setup.grid)}"
    block, thread = divmod(number, prod(setup.block))
    return f"thread {_place(thread, setup.block)} of block {_place(block, setup.grid)}"


def _place(number: int, size: tuple[int, ...]) -> str:
    x, y, _ = size
    return f"({number % x}, {number // x % y}, {number // x // y})"
