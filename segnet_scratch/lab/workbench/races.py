"""Finds races: results that depend on the order of threads, and elements that several threads write.

The host device runs the threads of a block one after the other between two barriers, and block after block. Without a
race their order makes no difference, so every order must give the same bits. Where one does not, more runs find out who
disturbs whom: the orders of threads and of blocks are changed one at a time, and the shared arrays compared at every
barrier. `x[0] += 1` by all threads is a race too, and yet right in every order when one thread runs after the other:
it shows when some of the threads are left out. Inside a block with barriers nobody can be left out:
there a race whose outcome is the same in every order stays hidden.

Who writes an element is found out so, too. Work is numbered: by thread of the grid, or by block for kernels whose
threads meet at barriers, because a block with threads missing would wait for ever. Any two unlike numbers differ in at
least one bit; so for each bit the work is cut into the half with a 0 there and the half with a 1, each run alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from segnet_scratch.lab.workbench.execution import ASCENDING, Executor, Outcome, shared_bytes
from segnet_scratch.lab.workbench.guards import FIRST, bits
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.signature import blank_comments

Part = tuple[int, int]  # mask and value: the numbers n with n & mask == value

_DESCENDING = HostOptions("descending", workers=1)
_TRACE = 1 << 20  # hashes; what happens after them is not compared


@dataclass(frozen=True)
class Difference:
    """The first element in which two runs differ."""

    array: str
    element: int  # counted without regard to the shape
    count: int  # elements that differ
    values: tuple[str, str]


def find_race(executor: Executor, first: Outcome, shuffles: int | None) -> str:
    """A report on a race; "" where ascending order (`first`), descending and so many shuffled ones give the same bits.

    Without a number of shuffles only descending order is looked at, and the report is one line.
    """
    shuffled = [HostOptions("shuffled", seed, workers=1) for seed in range(1, (shuffles or 0) + 1)]
    for order in [_DESCENDING, *shuffled]:
        other = executor.run(FIRST, order)
        if other.fault is not None:
            return f"in {_name(order)} order of threads and blocks: {other.fault}"
        if d := _difference(executor.setup, first, other):
            if shuffles is not None:
                return _report(executor, first, order, d)
            values = f"{d.values[0]} in ascending order of threads and blocks, {d.values[1]} in descending order"
            name = element_name(executor.setup, d.array, d.element)
            return f"race: {name} is {values}; --orders 6 (orders=6) names who disturbs whom"
    conflict = find_conflict(executor, first) if shuffles is not None else None
    if conflict is None:
        return ""
    name = element_name(executor.setup, *conflict)
    race = f"race: several threads write {name}, and no atomic operation keeps them apart"
    return "\n".join([race, *describe_writers(executor, *conflict)])


def _difference(setup: Setup, one: Outcome, other: Outcome) -> Difference | None:
    for name in setup.of_role("output", "updated"):
        unlike = one.unlike(other, name).nonzero()[0]
        if unlike.size:
            element = int(unlike[0])
            values = str(one.array(name)[element]), str(other.array(name)[element])
            return Difference(name, element, unlike.size, values)
    return None


def _report(executor: Executor, first: Outcome, order: HostOptions, d: Difference) -> str:
    threads_only = replace(order, block_order="ascending")
    blocks_only = replace(order, order="ascending", block_order=order.order)
    runs = (executor.run(FIRST, only) for only in (threads_only, blocks_only))
    of_threads, of_blocks = (_difference(executor.setup, first, run) is not None for run in runs)
    what = {
        (True, True): "threads: of those in a block, and of the blocks",
        (True, False): "threads: of those in a block, whatever the order of the blocks",
        (False, True): "threads: of the blocks, whatever the order inside them",
        (False, False): "threads: of those in a block and of the blocks together",
    }[of_threads, of_blocks]
    name, values = element_name(executor.setup, d.array, d.element), d.values
    lines = [
        f"race: the result depends on the order of {what}",
        f"{name} is {values[0]} in ascending order, {values[1]} in {_name(order)} order; "
        f"{d.count} of {first.array(d.array).size} elements of {d.array} differ",
    ]
    if of_threads:
        lines += _inside_a_block(executor, threads_only)
    return "\n".join([*lines, *describe_writers(executor, d.array, d.element)])


def _inside_a_block(executor: Executor, order: HostOptions) -> list[str]:
    """Between which barriers the threads of a block meet, and in which shared array."""
    if not executor.setup.kernel.cooperative:
        return []
    trace = shared_bytes(8 * _TRACE).view(np.uint64)
    executor.run(FIRST, replace(ASCENDING, trace=trace))
    fault = executor.run(FIRST, replace(order, trace=trace, compare_trace=True)).fault
    if fault is None:
        return ["at every barrier the shared arrays are the same: the threads meet after the last one, or in an output"]
    if "disturb each other" not in fault:
        return [fault]
    return [f"{fault}: one reads or writes what another writes, and no __syncthreads() is between them"]


def _name(order: HostOptions) -> str:
    return f"shuffled (seed {order.seed})" if order.order == "shuffled" else order.order


def find_conflict(executor: Executor, whole: Outcome) -> tuple[str, int] | None:
    """(array, element) of an element that two threads write, and not the same value; `whole` is a complete run.

    None as well for a file with atomic operations, which allow exactly that.
    """
    setup = executor.setup
    if "atomic" in blank_comments(setup.kernel.source.text):
        return None
    for bit in range(_bits(setup)):
        halves = [executor.run(FIRST, replace(ASCENDING, part=(1 << bit, value << bit))) for value in (0, 1)]
        if any(half.fault for half in halves):
            return None
        for name in setup.of_role("output", "updated"):
            a, b = (half.array(name) for half in halves)
            both = _written(setup, name, a) & _written(setup, name, b)
            both &= halves[0].unlike(halves[1], name) | halves[0].unlike(whole, name)
            if both.any():
                return name, int(both.argmax())
    return None


def describe_writers(executor: Executor, array: str, element: int) -> list[str]:
    """Names one writer of an element, or two where there are several; nothing where they cannot be told."""
    setup = executor.setup

    def writes(part: Part) -> bool:
        outcome = executor.run(FIRST, replace(ASCENDING, part=part))
        return outcome.fault is None and bool(_written(setup, array, outcome.array(array))[element])

    width, name = _bits(setup), element_name(setup, array, element)
    first = _writer(writes, (0, 0), width)
    if first is None:
        return []
    for bit in range(width):
        other_half = (1 << bit, ~first & 1 << bit)
        if writes(other_half) and (second := _writer(writes, other_half, width)) is not None:
            return [f"{name} is written by {_who(setup, first)} and by {_who(setup, second)}"]
    return [f"{name} is written by {_who(setup, first)} alone"]


def element_name(setup: Setup, array: str, element: int) -> str:
    """`y[1, 0, 3]`."""
    index = np.unravel_index(element, setup.shapes[array])
    return f"{array}[{', '.join(str(int(i)) for i in index)}]"


def _writer(writes: Callable[[Part], bool], part: Part, width: int) -> int | None:
    """The number of one thread or block of the part that writes; None where only several together do."""
    mask, value = part
    for bit in reversed(range(width)):
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
    return bits(array) != bits(np.ascontiguousarray(before))


def _who(setup: Setup, number: int) -> str:
    if setup.kernel.cooperative:
        return f"block {_place(number, setup.grid)}"
    block, thread = divmod(number, prod(setup.block))
    return f"thread {_place(thread, setup.block)} of block {_place(block, setup.grid)}"


def _place(number: int, size: tuple[int, ...]) -> str:
    x, y, _ = size
    return f"({number % x}, {number // x % y}, {number // x // y})"
