"""One hook on the computation: every op that runs, every kernel that is launched, the layer that they belong to.

A profiler watches through `observe`; nothing else needs to know of it, and unobserved an op costs a call. Layers
are named by `scope`, in which SegNet runs each of its blocks; autograd runs a backward in the scope of its forward.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from segnet_scratch.runtime.signature import ElementTypes, Kernel

T = TypeVar("T")


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
    arguments: Sequence[Any] = ()  # arrays, None for a null pointer, TensorMaps, numbers; once checked NumPy scalars


class Listener:
    """What is told of the computation. The methods here do what happens when nobody listens."""

    def op(self, op: Planned, run: Callable[[], None]) -> None:
        """An op is about to run; this must call `run`, once."""
        run()

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        """A kernel is about to be launched, by the op that runs; this calls `run`, or nothing is computed."""
        run()

    def barriers(self, count: int) -> None:
        """The host device has run that kernel; its blocks together met so many barriers."""


# Of each thread and asyncio task its own: what one computes is not told to who watches another.
_scope = ContextVar("scope", default="")
_NOBODY = Listener()
_listener = ContextVar("listener", default=_NOBODY)


@contextlib.contextmanager
def within(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Within this context a variable has a value, in this thread."""
    previous = variable.get()
    variable.set(value)
    try:
        yield
    finally:
        variable.set(previous)  # no token: a generator with this in it may be closed in another context


def observe(listener: Listener) -> contextlib.AbstractContextManager[None]:
    """Within this context a listener is told of everything that this thread computes; one at a time."""
    return within(_listener, listener)


def listener() -> Listener:
    """Who is told."""
    return _listener.get()


def scope(name: str) -> contextlib.AbstractContextManager[None]:
    """Within this context what is computed belongs to the layer of this name."""
    return within(_scope, name)


def current_scope() -> str:
    """The name of the layer that is computed; empty outside of any."""
    return _scope.get()


def carry_out(op: Planned, run: Callable[[], None]) -> None:
    """Calls `run`, which does the work of an op, under the eyes of the listener."""
    _listener.get().op(op, run)
