"""What a process knows of the others that train with it, and asks of them.

Every method that talks to others is called by all ranks, in the same order. What one of them cannot do it tells the
others in the place of its next value (`fail`), so that nobody waits for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from segnet_scratch.errors import SegnetError
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.observe import carry_out

Value = TypeVar("Value")


@dataclass(frozen=True)
class Transfer:
    """What goes between ranks, for whoever watches: so many bytes of this rank."""

    name: str
    bytes: int
    flops: int = 0


SUM, GATHER, WAIT = "sum_over_ranks", "gather_from_ranks", "wait_for_ranks"


class Arrays:
    """How arrays of a device go between ranks, in the line of its work; here there is one rank.

    capturable: may a CUDA graph hold what is asked here?
    """

    capturable = True

    def sum(self, device: Device, arrays: Sequence[Array]) -> None:
        """Every array becomes its sum over the ranks, added up in a fixed order: the same bits on all of them."""
        carry_out(Transfer(SUM, sum(array.nbytes for array in arrays)), lambda: self._sum(device, arrays))

    def gather(self, device: Device, array: Array) -> Array:
        """(size, *shape): the arrays of all ranks, in their order."""
        found: list[Array] = []
        carry_out(Transfer(GATHER, array.nbytes), lambda: found.append(self._gather(device, array)))
        return found[0]

    def _sum(self, device: Device, arrays: Sequence[Array]) -> None:
        pass

    def _gather(self, device: Device, array: Array) -> Array:
        return array[None]


class PeerError(SegnetError):
    """Another rank has failed, and says so itself: this one ends without a word."""


class Communicator:
    """One process by itself: rank 0 of 1.

    Attributes: rank of size; local_rank of local_size, those on this machine; host, its name; members, what there is to
    say of each rank; arrays, how arrays go between them.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    host = ""
    members: Sequence[str] = ()
    arrays = Arrays()

    @property
    def leads(self) -> bool:
        """Is this the rank that writes files and speaks?"""
        return self.rank == 0

    @property
    def label(self) -> str:
        """What begins this rank's messages: "rank 1 on node7: "; nothing where it is alone."""
        return f"rank {self.rank} on {self.host}: " if self.size > 1 else ""

    def on(self, device: Device) -> "Communicator":
        """The same ranks, for arrays of this device."""
        return self

    # Values of the CPU

    def exchange(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. PeerError where one has failed."""
        return [value]

    def total(self, value: float) -> float:
        """The sum over the ranks, added up in their order: the same on all of them."""
        return sum(self.exchange(value))

    def any(self, value: bool) -> bool:
        """Does one of them say so?"""
        return any(self.exchange(value))

    def first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, for all ranks."""
        return make()

    # Ends

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do at once. Where one fails in it the others wait for its arrays: it ends all of them."""
        yield

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """The whole of what ranks do together: none leaves before the others are done, or know that it has failed."""
        yield

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank goes no further."""


ALONE = Communicator()


def shares(count: int, ranks: int) -> np.ndarray:
    """How many of `count` things each rank takes where they are dealt out one by one: int64 (ranks)."""
    return (count + ranks - 1 - np.arange(ranks)) // ranks
