"""One hook on the computation: every op that runs, every kernel that is launched, the layer that they belong to.

An Observer (profiler, proofs, the compilation ahead of a run) is installed by `observe`; whoever computes does not know
of it, and without one an op costs one call more. Layers are named by `scope`, in which SegNet runs each of its blocks;
autograd runs a backward in the scope of its forward.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from segnet_scratch.runtime.signature import ElementTypes, Kernel

T = TypeVar("T")


class Work(Protocol):
    """What an observer is told of an op before it runs: its name and its cost."""

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


class Observer:
    """Is called at every op and every launch, in their place. The methods here do what happens unobserved."""

    def op(self, op: Work, run: Callable[[], None]) -> None:
        """An op is about to run; this must call `run`, once."""
        run()

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        """A kernel is about to be launched, by the op that runs; this calls `run`, or nothing is computed."""
        run()

    def barriers(self, count: int) -> None:
        """The host device has run the kernel; its blocks have met this many barriers in all."""


# Each thread and asyncio task has its own: an observer sees what its own thread computes.
_scope = ContextVar("scope", default="")
_NONE = Observer()
_observer = ContextVar("observer", default=_NONE)


@contextlib.contextmanager
def within(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Within this context a variable has a value, in this thread."""
    previous = variable.get()
    variable.set(value)
    try:
        yield
    finally:
        variable.set(previous)  # no token: a generator with this in it may be closed in another context


def observe(observer: Observer) -> contextlib.AbstractContextManager[None]:
    """Within this context the observer sees everything that this thread computes; an outer one sees nothing of it."""
    return within(_observer, observer)


def current_observer() -> Observer:
    """The observer in force; one that does nothing where there is none."""
    return _observer.get()


def scope(name: str) -> contextlib.AbstractContextManager[None]:
    """Within this context what is computed belongs to the layer of this name."""
    return within(_scope, name)


def current_scope() -> str:
    """The name of the layer that is computed; empty outside of any."""
    return _scope.get()


def carry_out(op: Work, run: Callable[[], None]) -> None:
    """Calls `run`, which does the work of an op, by way of the observer."""
    _observer.get().op(op, run)
