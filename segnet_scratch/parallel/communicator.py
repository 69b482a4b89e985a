"""What a process knows of the others that train with it, and the collective operations of all of them.

Every method that talks to others is called by all ranks, in the same order. What one of them cannot do it tells the
others in the place of its next value (`fail`), so that nobody waits for it. Gradients are summed over the ranks while
backward still makes more of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from segnet_scratch.errors import SegnetError
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.op import Buffers, spec_of
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.observe import carry_out

Value = TypeVar("Value")
BUCKET = 25 << 20  # bytes that are summed at once: enough to fill a network, few enough to begin early


@dataclass(frozen=True)
class Transfer:
    """A collective as observers see it: `bytes` of this rank."""

    name: str
    bytes: int
    flops: int = 0


SUM, GATHER, WAIT = "sum_over_ranks", "gather_from_ranks", "wait_for_ranks"


class Collectives:
    """Collective operations on arrays of a device, in the order of its stream; here there is one rank.

    capturable: may a CUDA graph contain them?
    """

    capturable = True

    def all_reduce(self, device: Device, arrays: Sequence[Array]) -> None:
        """Every array becomes its sum over the ranks, added up in a fixed order: the same bits on all of them."""
        carry_out(Transfer(SUM, sum(array.nbytes for array in arrays)), lambda: self._all_reduce(device, arrays))

    def all_gather(self, device: Device, array: Array) -> Array:
        """(size, *shape): the arrays of all ranks, in their order."""
        found: list[Array] = []
        carry_out(Transfer(GATHER, array.nbytes), lambda: found.append(self._all_gather(device, array)))
        return found[0]

    def _all_reduce(self, device: Device, arrays: Sequence[Array]) -> None:
        pass

    def _all_gather(self, device: Device, array: Array) -> Array:
        return array[None]


class PeerError(SegnetError):
    """Another rank has failed, and says so itself: this one ends without a word."""


class Communicator:
    """One process by itself: rank 0 of 1.

    Attributes: rank of size; local_rank of local_size, those on this machine; host, its name; members, a line about
    each rank; collectives, the operations on arrays of a device.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    host = ""
    members: Sequence[str] = ()
    collectives = Collectives()

    @property
    def leads(self) -> bool:
        """Is this rank 0, which alone writes files and prints?"""
        return self.rank == 0

    @property
    def label(self) -> str:
        """What begins this rank's messages: "rank 1 on node7: "; nothing where it is alone."""
        return f"rank {self.rank} on {self.host}: " if self.size > 1 else ""

    def on(self, device: Device) -> "Communicator":
        """The same ranks, for arrays of this device."""
        return self

    # Values of the CPU

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. PeerError where one has failed."""
        return [value]

    def all_reduce(self, value: float) -> float:
        """The sum over the ranks, added up in their order: the same on all of them."""
        return sum(self.all_gather(value))

    def any(self, value: bool) -> bool:
        """Does one of them say so?"""
        return any(self.all_gather(value))

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, for all ranks."""
        return make()

    # Ends

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around collectives on arrays: a rank that fails in it ends all ranks, which would wait for its arrays."""
        yield

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Around all that ranks do together: none leaves before the others are done, or know that it has failed."""
        yield

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank goes no further."""


ALONE = Communicator()


def shares(count: int, ranks: int) -> np.ndarray:
    """How many of `count` things each rank gets, dealt out one by one: int64 (ranks)."""
    return (count + ranks - 1 - np.arange(ranks)) // ranks


class GradientSum:
    """Sums gradients over the ranks as backward makes them: in buckets, on a side stream while backward goes on.

    `rounded`: those of float32 travel as bfloat16, half the bytes. Each rank's gradient then errs relatively by up to
    2^-8 of itself, and so does the sum, each time that it is rounded: once where MPI carries it in float32, after every
    addition in NCCL.
    """

    def __init__(self, ranks: Communicator, device: Device, rounded: bool = False) -> None:
        self._ranks, self._device, self._rounded = ranks, device, rounded
        self._waiting: list[Array] = []

    def add(self, gradient: Array) -> None:
        """Takes a gradient that is complete; nobody may touch it until `finish`."""
        if self._ranks.size == 1:
            return
        self._waiting.append(gradient)
        if sum(array.nbytes for array in self._waiting) >= BUCKET:
            self._begin()

    def finish(self, loss: Array) -> None:
        """Whatever the device computes after this finds the sums, that of the loss as well."""
        if self._ranks.size == 1:
            return
        self._begin()
        with self._device.side_stream():
            self._ranks.collectives.all_reduce(self._device, [loss])
        carry_out(Transfer(WAIT, 0), self._device.join)

    def _begin(self) -> None:
        arrays, self._waiting = self._waiting, []
        with self._device.side_stream():
            if not self._rounded:
                self._ranks.collectives.all_reduce(self._device, arrays)
                return
            halves = [Cast.plan(spec_of(array))(self._device, x=array).y for array in arrays]
            self._ranks.collectives.all_reduce(self._device, halves)
            for half, array in zip(halves, arrays, strict=True):
                Cast.plan(spec_of(half)).run(self._device, Buffers(x=half, y=array))
