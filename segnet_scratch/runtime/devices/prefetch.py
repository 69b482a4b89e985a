"""Copies that run while a GPU computes: the arrays of the next item travel there while one is worked on, and results
travel back."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from segnet_scratch.errors import DeviceMemoryError
from segnet_scratch.runtime.devices.base import Array, Item, PendingDownload

SLOTS = 2  # one is worked on, the other is filled


class Prefetcher:
    """A copy stream, a thread that fills pinned memory for it, and two slots that take turns.

    A copy runs beside kernels only from pinned memory and on a stream that does not wait for the default stream. Both
    then need what a single stream gives for nothing:

    * compute waits for the event `copied` before it reads a slot's arrays;
    * a copy waits for the event `used` before it overwrites them;
    * the thread waits for `copied` before it overwrites the pinned memory.

    The slots keep their arrays. An array from CuPy's pool, forgotten by Python, would be handed out again at once to
    the stream that it was allocated on, whatever the copy stream still does with it.
    """

    def __init__(self, cupy: Any, allocate: Callable[[Sequence[int], Any], Array]) -> None:
        self._cupy = cupy
        self._gpu = cupy.cuda.Device()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._slots = [_Slot(cupy, allocate) for _ in range(SLOTS)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="segnet-upload")

    def run(
        self, items: Iterator[Item], arrays_of: Callable[[Item], Sequence[np.ndarray]]
    ) -> Generator[tuple[Item, tuple[Array, ...]], None, None]:
        """See `Device.prefetch`."""
        slots = itertools.cycle(self._slots)

        def stage() -> tuple[Item, _Slot, tuple[Array, ...], Future[None]] | Exception | None:
            try:
                item = next(items)
                slot, arrays = next(slots), arrays_of(item)
                slot.make_room(arrays)
                targets = slot.views(slot.on_device, arrays)
                return item, slot, tuple(targets), self._thread.submit(self._copy, slot, arrays, targets)
            except StopIteration:
                return None
            except Exception as error:  # raised when the item before it has been worked on
                return error

        try:
            ahead = stage()
            while ahead is not None:
                if isinstance(ahead, Exception):
                    raise ahead
                item, slot, targets, copying = ahead
                ahead = stage()
                copying.result()
                self._cupy.cuda.get_current_stream().wait_event(slot.copied)
                yield item, targets
                slot.used.record()
        finally:
            self._thread.shutdown()
            self._stream.synchronize()  # a copy may be on its way still, from and to memory that is freed now

    def _copy(self, slot: "_Slot", arrays: Sequence[np.ndarray], targets: Sequence[Array]) -> None:
        """In the thread: to pinned memory, which takes the CPU a while, then off to the GPU."""
        with self._gpu:  # the current GPU is a thread's own affair
            slot.copied.synchronize()
            self._stream.wait_event(slot.used)
            for array, pinned, target in zip(arrays, slot.views(slot.pinned, arrays), targets, strict=True):
                pinned[...] = array
                target.set(pinned, stream=self._stream)
            slot.copied.record(self._stream)


class _Slot:
    """Where the arrays of one item lie, on the host and on the GPU, and the events that say who may touch them."""

    def __init__(self, cupy: Any, allocate: Callable[[Sequence[int], Any], Array]) -> None:
        self._cupy, self._allocate = cupy, allocate
        self.pinned: list[np.ndarray] = []
        self.on_device: list[Array] = []
        self.copied = cupy.cuda.Event(disable_timing=True)  # the last copy has read `pinned` and written `on_device`
        self.used = cupy.cuda.Event(disable_timing=True)  # what was launched to read `on_device` has done so

    def make_room(self, arrays: Sequence[np.ndarray]) -> None:
        """Allocates unless what is there suffices. On the stream that computes: the pool's blocks belong to it."""
        if len(arrays) == len(self.pinned) and all(
            a.dtype == held.dtype and a.size <= held.size for a, held in zip(arrays, self.pinned, strict=True)
        ):
            return
        self.copied.synchronize()
        self.pinned, self.on_device = [], []
        for array in arrays:
            self.pinned.append(_pinned(self._cupy, array))
            self.on_device.append(self._allocate((array.size,), array.dtype))
        self.used.record()  # earlier launches may still use the memory that the pool gave

    @staticmethod
    def views(held: Sequence[Array], arrays: Sequence[np.ndarray]) -> list[Array]:
        """The part of each held array that an item's array takes, in its shape."""
        return [h[: a.size].reshape(a.shape) for h, a in zip(held, arrays, strict=True)]


class PinnedDownload(PendingDownload):
    """Copies to pinned memory on the current stream, and an event behind them.

    Where no memory can be pinned it waits for the copies: what has been computed may not be lost.
    """

    def __init__(self, cupy: Any, arrays: Sequence[Array]) -> None:
        try:
            super().__init__([_pinned(cupy, array).reshape(array.shape) for array in arrays])
            waits = False
        except DeviceMemoryError:
            super().__init__([np.empty(array.shape, array.dtype) for array in arrays])
            waits = True
        for array, target in zip(arrays, self._arrays, strict=True):
            array.get(out=target, blocking=waits)
        self._sources = arrays  # kept until they have been copied
        self._arrived = cupy.cuda.Event(disable_timing=True)
        self._arrived.record()

    @property
    def ready(self) -> bool:
        return bool(self._arrived.done)

    def get(self) -> list[np.ndarray]:
        self._arrived.synchronize()
        return self._arrays


def _pinned(cupy: Any, like: "np.ndarray | Array") -> np.ndarray:
    """So many elements of this type in pinned memory."""
    try:
        memory = cupy.cuda.alloc_pinned_memory(like.nbytes)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceMemoryError(
            f"{like.nbytes:,} bytes of the computer's memory cannot be pinned for copies to the GPU: {error}",
            asked=like.nbytes,
            free=0,
        ) from error
    return np.frombuffer(memory, like.dtype, like.size)
