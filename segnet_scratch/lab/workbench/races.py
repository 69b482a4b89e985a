"""Finds races: results that depend on the order of threads, and elements that several threads write.

The host device runs the threads of a block one after the other between two barriers, and block after block. Without a
race their order makes no difference, so every order must give the same bits. Where one does not, more runs find out who
disturbs whom: the orders of threads and of blocks are changed one at a time, and the shared arrays compared at every
barrier. `x[0] += 1` by all threads is a race too, and yet right in every order when one thread runs after the other:
it shows when some of the threads are left out (see writers.py). Inside a block with barriers nobody can be left out:
there a race whose outcome is the same in every order stays hidden.
"""

from dataclasses import dataclass, replace

import numpy as np

from segnet_scratch.lab.workbench.execution import Executor, Outcome, shared_bytes
from segnet_scratch.lab.workbench.guards import FIRST
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.lab.workbench.writers import describe_writers, element_name, find_conflict
from segnet_scratch.runtime.host import HostOptions

_ASCENDING = HostOptions(workers=1)
_TRACE = 1 << 20  # hashes; what happens after them is not compared


@dataclass(frozen=True)
class Difference:
    """The first element in which two runs differ."""

    array: str
    element: int  # counted without regard to the shape
    count: int  # elements that differ
    values: tuple[str, str]


_DESCENDING = HostOptions("descending", workers=1)


def order_dependence(executor: Executor, first: Outcome) -> str | None:
    """What another order than that of a first run changes, in one line; None where descending order gives the same."""
    other = executor.run(FIRST, _DESCENDING)
    if other.fault is not None:
        return f"in descending order of threads and blocks: {other.fault}"
    d = _difference(executor.setup, first, other)
    if d is None:
        return None
    return (
        f"race: {element_name(executor.setup, d.array, d.element)} is {d.values[0]} in ascending order of threads and "
        f"blocks, {d.values[1]} in descending order; --orders 6 (orders=6) names who disturbs whom"
    )


def find_race(executor: Executor, shuffles: int) -> str | None:
    """A report on a race; None where ascending, descending and so many shuffled orders give the same bits."""
    first = executor.run(FIRST, _ASCENDING)
    shuffled = [HostOptions("shuffled", seed, workers=1) for seed in range(1, shuffles + 1)]
    for order in [_DESCENDING, *shuffled]:
        other = executor.run(FIRST, order)
        if other.fault is not None:
            return f"in {_name(order)} order of threads and blocks: {other.fault}"
        difference = _difference(executor.setup, first, other)
        if difference is not None:
            return _report(executor, first, order, difference)
    conflict = find_conflict(executor, first)
    if conflict is None:
        return None
    array, element = conflict
    who = describe_writers(executor, array, element)
    name = element_name(executor.setup, array, element)
    return "\n".join([f"race: several threads write {name}, and no atomic operation keeps them apart", *who])


def _difference(setup: Setup, one: Outcome, other: Outcome) -> Difference | None:
    for name in setup.of_role("output", "updated"):
        a, b = one.array(name), other.array(name)
        unlike = (_bytes(a) != _bytes(b)).any(axis=1).nonzero()[0]
        if unlike.size:
            element = int(unlike[0])
            return Difference(name, element, unlike.size, (str(a[element]), str(b[element])))
    return None


def _bytes(array: np.ndarray) -> np.ndarray:
    """(elements, bytes of each)."""
    return array.reshape(-1, 1).view(np.uint8)


def _report(executor: Executor, first: Outcome, order: HostOptions, d: Difference) -> str:
    threads_only = replace(order, block_order="ascending")
    blocks_only = replace(order, order="ascending", block_order=order.order)
    of_threads = _difference(executor.setup, first, executor.run(FIRST, threads_only)) is not None
    of_blocks = _difference(executor.setup, first, executor.run(FIRST, blocks_only)) is not None
    what = {
        (True, True): "threads: of those in a block, and of the blocks",
        (True, False): "threads: of those in a block, whatever the order of the blocks",
        (False, True): "threads: of the blocks, whatever the order inside them",
        (False, False): "threads: of those in a block and of the blocks together",
    }[of_threads, of_blocks]
    lines = [
        f"race: the result depends on the order of {what}",
        f"{element_name(executor.setup, d.array, d.element)} is {d.values[0]} in ascending order, {d.values[1]} in "
        f"{_name(order)} order; {d.count} of {first.array(d.array).size} elements of {d.array} differ",
    ]
    if of_threads:
        lines += _inside_a_block(executor, threads_only)
    return "\n".join([*lines, *describe_writers(executor, d.array, d.element)])


def _inside_a_block(executor: Executor, order: HostOptions) -> list[str]:
    """Between which barriers the threads of a block meet, and in which shared array."""
    if not executor.setup.kernel.cooperative:
        return []
    trace = shared_bytes(8 * _TRACE).view(np.uint64)
    executor.run(FIRST, replace(_ASCENDING, trace=trace))
    fault = executor.run(FIRST, replace(order, trace=trace, compare_trace=True)).fault
    if fault is None:
        return ["at every barrier the shared arrays are the same: the threads meet after the last one, or in an output"]
    if "disturb each other" not in fault:
        return [fault]
    return [f"{fault}: one reads or writes what another writes, and no __syncthreads() is between them"]


def _name(order: HostOptions) -> str:
    return f"shuffled (seed {order.seed})" if order.order == "shuffled" else order.order
