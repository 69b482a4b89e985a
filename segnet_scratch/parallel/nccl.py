"""Sums of arrays between GPUs, by NCCL through CuPy: on the stream that is current, and so inside a CUDA graph, too.

Gradients are summed where they lie, those of a bucket in one launch. One communicator serves all streams: NCCL keeps
its launches in their order, which is the same on all ranks, as every rank makes the same step. For one topology and
number of ranks NCCL adds up in the same order each time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from segnet_scratch.parallel.communicator import Arrays
from segnet_scratch.runtime.devices import Array, Device, nccl_library
from segnet_scratch.runtime.precision import BFLOAT16


def new_identity() -> Any:
    """What rank 0 makes and every rank of a communicator must know."""
    return nccl_library().get_unique_id()


class NcclArrays(Arrays):
    """Arrays of GPUs, of which each rank has one of its own. To make it is a matter of all ranks."""

    def __init__(self, identity: Any, rank: int, size: int) -> None:
        self._nccl = nccl = nccl_library()
        self._comm, self._size = nccl.NcclCommunicator(size, identity, rank), size
        types = {np.float32: nccl.NCCL_FLOAT32, np.float64: nccl.NCCL_FLOAT64, BFLOAT16: nccl.NCCL_BFLOAT16}
        self._types = {np.dtype(dtype): number for dtype, number in types.items()}

    def _sum(self, device: Device, arrays: Sequence[Array]) -> None:
        self._nccl.groupStart()
        try:
            for array in arrays:
                address, kind = device.address(array), self._types[np.dtype(array.dtype)]
                self._comm.allReduce(address, address, array.size, kind, self._nccl.NCCL_SUM, device.stream())
        finally:
            self._nccl.groupEnd()

    def _gather(self, device: Device, array: Array) -> Array:
        found = device.empty((self._size, *array.shape), array.dtype)
        addresses = device.address(array), device.address(found)
        self._comm.allGather(*addresses, array.size, self._types[np.dtype(array.dtype)], device.stream())
        return found
