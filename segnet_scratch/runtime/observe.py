"""One hook on the computation: every op that runs, every kernel that is launched, the layer that they belong to.

A profiler watches through `observe`; nothing else needs to know of it, and unobserved an op costs a comparison. Layers
are named by `scope`, in which SegNet runs each of its blocks; autograd runs a backward in the scope of its forward.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from segnet_scratch.runtime.signature import ElementTypes, Kernel


class Planned(Protocol):
    """What an op says of itself before it runs."""

    @property
    def name(self) -> str:
        """Op and direction: `relu_backward`."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the definition, whatever way of computing it is taken."""

    @property
    def bytes(self) -> int:
        """Bytes that must cross the memory bus at least once."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: "Kernel"
    types: "ElementTypes"
    grid: tuple[int, ...]  # blocks in x, y, z
    block: tuple[int, ...]  # threads in x, y, z
    shared: int  # bytes of dynamic shared memory


class Listener:
    """What is told of the computation. The methods here do what happens when nobody listens."""

    def op(self, op: Planned, run: Callable[[], None]) -> None:
        """An op is about to run; this must call `run`, once."""
        run()

    def launch(self, launch: Launch) -> None:
        """A kernel is about to be launched, by the op that runs."""

    def barriers(self, count: int) -> None:
        """The host device has run that kernel; its blocks together met so many barriers."""


_scope = ""
_listener: Listener | None = None


@contextlib.contextmanager
def observe(listener: Listener) -> Iterator[None]:
    """Within this context a listener is told of everything that is computed; one at a time."""
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Within this context what is computed belongs to the layer of this name."""
    global _scope
    previous, _scope = _scope, name
    try:
        yield
    finally:
        _scope = previous


def current_scope() -> str:
    """The name of the layer that is computed; empty outside of any."""
    return _scope


def carry_out(op: Planned, run: Callable[[], None]) -> None:
    """Calls `run`, which does the work of an op, under the eyes of the listener."""
    if _listener is None:
        run()
    else:
        _listener.op(op, run)


def launched(launch: Launch) -> None:
    """Tells the listener of a launch."""
    if _listener is not None:
        _listener.launch(launch)


def passed_barriers(count: int) -> None:
    """Tells the listener how many barriers the blocks of the last launch met."""
    if _listener is not None:
        _listener.barriers(count)
