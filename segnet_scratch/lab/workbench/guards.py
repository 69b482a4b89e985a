"""Guard zones: memory of known contents before and after an array, so that an access outside of it shows.

A kernel is run with several fills. An element that holds the fill each time was never written. One that holds
something else, but not the same each time, depends on what lay there before or beside it.

A write is seen afterwards in the bytes. No two elements of the zones are alike, and the zones of no two arrays: what a
kernel without a bounds check copies from beside one array to beside another is not what lay there. A read is seen
because two runs have unlike zones; under AddressSanitizer the zones are out of bounds as well, and it stops at the line
that touches them.
"""

import ctypes
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from segnet_scratch.errors import LaunchError
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.runtime.devices import Array, Device, HostDevice
from segnet_scratch.runtime.precision import is_floating

_LARGE = 0.0, 2.0**100, -(2.0**100)
GUARD = 1024  # elements before and after every array
ARRAYS_MARK = "segnet-arrays: "  # begins the line that tells where arrays lie: first byte, bytes, bytes of an element
# A NaN that no computation makes, by the size of the number, and an ordinary number that none is likely to make.
_NAN_BITS = {2: 0x7FD5, 4: 0x7FE5EED5, 8: 0x7FFC5EED5EED5EED}
_NUMBER = 0.73582345  # of the size of others, so that sums with it show
_INTEGER_BYTES = 0xA5, 0x5A
# NaN in every format, a large number and a small one: a maximum passes over two of them, and a minimum too.
_SHARED_BYTES = 0xFF, 0x7B, 0xFB


@dataclass(frozen=True)
class Fill:
    """What memory without a value holds in a run: in the first kind of run NaN, in others ordinary numbers.

    `values` is the kind of what outputs hold, `guards` that of guard zones, `shared` that of shared memory on the host.
    """

    values: int
    guards: int
    shared: int

    def of(self, dtype: np.dtype) -> np.ndarray:
        """One element of an output."""
        if not is_floating(dtype):
            return np.full(dtype.itemsize, _INTEGER_BYTES[self.values], np.uint8).view(dtype).reshape(())
        if self.values:
            return np.array(_NUMBER).astype(dtype)
        return np.array(_NAN_BITS[dtype.itemsize], f"u{dtype.itemsize}").view(dtype)

    def zones(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The zones (2, GUARD) before and after the array of this name: NaN of many kinds, or large numbers.

        A maximum passes over NaN, but not over large numbers, and a minimum not over negative ones.
        Integers are small, since a kernel that takes one for an index goes astray no further than it must, and on
        either side of what inputs hold, so that comparisons differ.
        """
        rng = np.random.default_rng([self.guards, zlib.crc32(name.encode())])
        if not is_floating(dtype):
            low, high = (64, 128) if not self.guards else (-128, -64) if dtype.kind == "i" else (0, 4)
            return rng.integers(low, high, (2, GUARD)).astype(dtype)
        if self.guards:
            return (_LARGE[self.guards] * rng.uniform(0.5, 2, (2, GUARD))).astype(dtype)
        fraction = rng.integers(1, {2: 2**6, 4: 2**22, 8: 2**51}[dtype.itemsize], (2, GUARD))
        quiet = {2: 0x7FC0, 4: 0x7FC00000, 8: 0x7FF8000000000000}[dtype.itemsize]
        return (fraction + quiet).astype(f"u{dtype.itemsize}").view(dtype)

    @property
    def shared_byte(self) -> int:
        """What every byte of shared memory holds on the host device."""
        return _SHARED_BYTES[self.shared]


FIRST, SECOND, THIRD = Fill(0, 0, 0), Fill(1, 1, 1), Fill(0, 2, 2)
# Each tells apart one thing that the others change.
OTHER_GUARDS, OTHER_SHARED = (Fill(0, 1, 0), Fill(0, 2, 0)), (Fill(0, 0, 1), Fill(0, 0, 2))


def own_bytes(size: int) -> np.ndarray:
    """Memory of this process."""
    return np.empty(size, np.uint8)


class GuardedArrays:
    """Arrays of a device, each between guard zones; with `forbid` these are out of bounds until `damage` looks.

    `allocate` makes so many bytes: memory that two processes share, for instance.
    """

    def __init__(self, device: Device, fill: Fill, allocate: Callable[[int], np.ndarray] = own_bytes) -> None:
        self.device, self.fill, self.allocate = device, fill, allocate
        self._buffers: dict[str, Array] = {}  # guard zone, array, guard zone
        self._forbidden = False

    def add(self, name: str, contents: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A device array with these contents, or with the fill."""
        size = int(np.prod(shape))
        elements = self.allocate((size + 2 * GUARD) * dtype.itemsize).view(dtype)
        held = bits(elements)  # an assignment of NaN or of booleans may change their bits
        held[:GUARD], held[GUARD + size :] = bits(self.fill.zones(name, dtype))
        if contents is None:
            held[GUARD : GUARD + size] = bits(self.fill.of(dtype).reshape(1))
        else:
            inside(elements, shape)[...] = contents
        self._buffers[name] = self.device.upload(elements)
        return inside(self._buffers[name], shape)

    def forbid(self) -> None:
        """Under AddressSanitizer guard zones are out of bounds from now on; whoever reads its reports is told where."""
        if not isinstance(self.device, HostDevice) or not self.device.options.sanitize:
            return
        self._forbidden = True
        regions = {}
        for name, buffer in self._buffers.items():
            _mark("poison", buffer)
            guard = GUARD * buffer.itemsize
            regions[name] = buffer.ctypes.data + guard, buffer.nbytes - 2 * guard, buffer.itemsize
        os.write(2, f"{ARRAYS_MARK}{json.dumps(regions)}\n".encode())

    def damage(self) -> dict[str, list[str]]:
        """Writes outside the arrays, by array, each with the element next to it."""
        if self._forbidden:
            for buffer in self._buffers.values():
                _mark("unpoison", buffer)
        return {name: self._damage(name, self.device.download(buffer)) for name, buffer in self._buffers.items()}

    def _damage(self, name: str, buffer: np.ndarray) -> list[str]:
        reports = []
        size = buffer.size - 2 * GUARD
        zones = buffer[:GUARD], buffer[-GUARD:]
        for zone, was, end in zip(zones, bits(self.fill.zones(name, buffer.dtype)), (False, True), strict=True):
            if (hit := (bits(zone) != was).nonzero()[0]).size:
                nearest = int(hit[0]) + size if end else int(hit[-1]) - GUARD
                where = "past its end" if end else "before its start"
                count = f"{hit.size} element{'s' if hit.size > 1 else ''} written {where}"
                reports.append(f"{name}: {count}, the nearest is {name}[{nearest}]; the array has {size} elements")
        return reports

    def __len__(self) -> int:
        return len(self._buffers)


def place(
    setup: Setup, device: Device, fill: Fill, allocate: Callable[[int], np.ndarray] = own_bytes
) -> tuple[GuardedArrays, dict[str, Array | None]]:
    """The guarded arrays of a setup, and the arrays themselves by name; None for a null pointer."""
    guarded = GuardedArrays(device, fill, allocate)
    arrays: dict[str, Array | None] = dict.fromkeys(setup.shapes)
    for name in setup.of_role("input", "updated", "output"):
        shape, dtype = setup.shapes[name], setup.dtype(name)
        try:
            arrays[name] = guarded.add(name, setup.contents.get(name), shape, dtype)
        except (MemoryError, OSError, OverflowError, ValueError) as error:
            what = f"{name} {shape}, {(prod(shape) + 2 * GUARD) * dtype.itemsize} bytes"
            raise LaunchError(f"{setup.kernel.name}: no memory for {what}: {error}") from error
    return guarded, arrays


def inside(buffer: Array, shape: tuple[int, ...]) -> Array:
    """The array between its guard zones, on any device; a view."""
    return buffer[GUARD:-GUARD].reshape(shape)


def bits(array: np.ndarray) -> np.ndarray:
    """The elements as integers: NaN equals NaN, and 0 is not -0."""
    return array.view(f"u{array.dtype.itemsize}")


def _mark(how: str, buffer: np.ndarray) -> None:
    """Poisons the zones of a buffer, or takes that back before anybody else reads them or uses the memory."""
    mark = getattr(ctypes.CDLL(None), f"__asan_{how}_memory_region")
    mark.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    guard = GUARD * buffer.itemsize
    mark(buffer.ctypes.data, guard)
    mark(buffer.ctypes.data + buffer.nbytes - guard, guard)
