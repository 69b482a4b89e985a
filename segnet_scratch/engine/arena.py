"""One block of memory for all arrays of a step, planned before anything runs.

An array that lives from one step of a program to another shares its place with arrays that live at other times. What is
placed where follows from sizes and lifetimes alone, so that a captured graph finds everything where it was recorded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from segnet_scratch.ops.op import Spec
from segnet_scratch.runtime.devices import Array, Device

ALIGNMENT = 256  # bytes: what cudaMalloc guarantees, and more than any access of a kernel needs


@dataclass(frozen=True)
class Lifetime:
    """An array and the steps of a program, first and last, that touch it."""

    spec: Spec
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, up to the next aligned address."""
        return -(-self.spec.nbytes // ALIGNMENT) * ALIGNMENT

    def meets(self, other: "Lifetime") -> bool:
        """Is there a step at which both hold something?"""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Where each array lies: its offset in bytes, and how many bytes all of them take."""

    lifetimes: Mapping[str, Lifetime]
    offsets: Mapping[str, int]
    nbytes: int

    @staticmethod
    def plan(lifetimes: Mapping[str, Lifetime]) -> "Arena":
        """Places the arrays one by one, the largest first, each at the lowest offset that is free while it lives.

        To pack them best is NP-hard; largest first comes close to what is alive at the fullest step, which no placement
        can beat.
        """
        placed: list[tuple[int, Lifetime]] = []
        offsets: dict[str, int] = {}
        for name, lifetime in sorted(lifetimes.items(), key=lambda item: (-item[1].nbytes, item[1].first, item[0])):
            offset = 0
            for start, other in sorted(((o, l) for o, l in placed if l.meets(lifetime)), key=lambda pair: pair[0]):
                if offset + lifetime.nbytes <= start:
                    break
                offset = max(offset, start + other.nbytes)
            offsets[name] = offset
            placed.append((offset, lifetime))
        return Arena(dict(lifetimes), offsets, max((o + l.nbytes for o, l in placed), default=0))

    def alive(self, step: int) -> dict[str, int]:
        """Bytes of each array that holds something at a step."""
        return {name: l.nbytes for name, l in self.lifetimes.items() if l.first <= step <= l.last}

    def allocate(self, device: Device) -> dict[str, Array]:
        """The arrays, as views of one allocation."""
        memory = device.empty((self.nbytes,), "uint8")
        return {name: view(memory, offset, self.lifetimes[name].spec) for name, offset in self.offsets.items()}


def view(memory: Array, offset: int, spec: Spec) -> Array:
    """An array of this Spec at an offset of a block of bytes."""
    return memory[offset : offset + spec.nbytes].view(spec.dtype).reshape(spec.shape)
