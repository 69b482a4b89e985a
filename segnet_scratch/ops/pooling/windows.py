"""What max-pool and max-unpool share: 2x2 windows of stride 2 in ceil mode, and the codes that name a position in one.

A map (n, h, w, c) has ceil(h/2) x ceil(w/2) windows; at an odd edge the last one is cut off. A code 0..3 is the
row-major position in the window. `scatter` and `gather` are the plain definitions; cuda/common/windows.cuh is the
kernels' side.
"""

from dataclasses import dataclass

import numpy as np

from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.ops.pieces import MAP_THREADS, map_grid
from segnet_scratch.runtime.devices import Array, Device

CODE = np.dtype(np.uint8)


@dataclass(frozen=True)
class PoolCodes:
    """Where the maxima of a pool were: what its unpool needs, two bits of information a window.

    `codes` is uint8 (n, ceil(h/2), ceil(w/2), c) on the device, `size` the (h, w) of the map that was pooled.
    """

    codes: Array
    size: tuple[int, int]


def windows_of(n: int, h: int, w: int, c: int) -> tuple[int, int, int, int]:
    """Shape of the values and codes of a map (n, h, w, c)."""
    return n, (h + 1) // 2, (w + 1) // 2, c


class WindowOp(Op):
    """What goes through a map window by window: `pieces` 16 bytes of channels at a time, where they come so."""

    pieces = True

    def launch(self, device: Device, b: Buffers) -> None:
        self.over_windows(device, b, f"{self.name}_pieces")

    def over_windows(self, device: Device, b: Buffers, by_pieces: str, **given: Array) -> None:
        """Launches this kernel for float32 in fours of channels, with what is `given`, else that of the op's name."""
        values = getattr(b, self.over or next(iter(self.outputs)))
        at_once = values.dtype == np.float32 and values.shape[3] % 4 == 0
        if self.pieces and at_once and not any(device.address(array) % 16 for array in vars(b).values()):
            self.kernel(device, by_pieces, b, map_grid(device, values, resident=4), MAP_THREADS, **given)
        else:
            self.kernel(device, self.name, b)


def window_elements(map_: np.ndarray) -> list[tuple[int, tuple[slice, ...]]]:
    """For each code the slice of the map that holds its elements: rows code // 2, 2 + code // 2, ..."""
    return [(code, (slice(None), slice(code // 2, None, 2), slice(code % 2, None, 2))) for code in range(4)]


def valid_codes(codes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The codes, with 0 for every code that points outside the map (or is no code at all)."""
    lowest, rightmost = codes[:, -1] if size[0] % 2 else codes[:, :0], codes[:, :, -1] if size[1] % 2 else codes[:, :0]
    if codes.max() <= 3 and not (lowest & 2).any() and not (rightmost & 1).any():
        return codes  # as a pool writes them; to see that is much faster than what follows
    rows, columns = np.arange(codes.shape[1])[:, None, None], np.arange(codes.shape[2])[:, None]
    outside = (codes > 3) | (2 * rows + (codes >> 1) >= size[0]) | (2 * columns + (codes & 1) >= size[1])
    return np.where(outside, 0, codes)


def scatter(values: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Each value at the element of out that its code names, 0 elsewhere; one that names no element is lost."""
    for code, elements in window_elements(out):
        target = out[elements]
        rows, columns = target.shape[1:3]
        target[...] = np.where(codes == code, values, 0)[:, :rows, :columns]


def gather(map_: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """The element of the map that each code names, 0 where it names none."""
    out[...] = 0
    for code, elements in window_elements(map_):
        source = map_[elements]
        rows, columns = source.shape[1:3]
        np.copyto(out[:, :rows, :columns], source, where=codes[:, :rows, :columns] == code)
