"""Processes of MPI, through mpi4py: small values between them, and sums of arrays.

Of arrays that lie in the CPU's memory MPI promises no order of a sum. So every rank is sent its piece of each rank's
array, adds them up in the order of the ranks, and sends the sum to all: twice the bytes of the array, as a ring has it,
and the same bits each time.

Between GPUs NCCL sums, through CuPy: on the stream that is current, and so inside a CUDA graph, too. Gradients are
summed where they lie, those of a bucket in one launch. One communicator serves all streams: NCCL keeps its launches in
their order, which is the same on all ranks, as every rank makes the same step. For one topology and number of ranks
NCCL adds up in the same order each time.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.parallel.communicator import Collectives, Communicator, PeerError, Value
from segnet_scratch.runtime.devices import Array, Device, nccl_library
from segnet_scratch.runtime.precision import BFLOAT16

PATIENCE = 10.0  # seconds that a rank which has failed waits for the others to hear of it, before it ends them


def new_identity() -> Any:
    """What rank 0 makes and every rank of a communicator must know."""
    return nccl_library().get_unique_id()


class NcclCollectives(Collectives):
    """Arrays of GPUs, of which each rank has one of its own. To make it is a matter of all ranks."""

    def __init__(self, identity: Any, rank: int, size: int) -> None:
        self._nccl = nccl = nccl_library()
        self._comm, self._size = nccl.NcclCommunicator(size, identity, rank), size
        types = {np.float32: nccl.NCCL_FLOAT32, np.float64: nccl.NCCL_FLOAT64, BFLOAT16: nccl.NCCL_BFLOAT16}
        self._types = {np.dtype(dtype): number for dtype, number in types.items()}

    def _all_reduce(self, device: Device, arrays: Sequence[Array]) -> None:
        self._nccl.groupStart()
        try:
            for array in arrays:
                address, kind = device.address(array), self._types[np.dtype(array.dtype)]
                self._comm.allReduce(address, address, array.size, kind, self._nccl.NCCL_SUM, device.stream())
        finally:
            self._nccl.groupEnd()

    def _all_gather(self, device: Device, array: Array) -> Array:
        found = device.empty((self._size, *array.shape), array.dtype)
        addresses = device.address(array), device.address(found)
        self._comm.allGather(*addresses, array.size, self._types[np.dtype(array.dtype)], device.stream())
        return found


@dataclass(frozen=True)
class _Failure:
    """What a rank that has failed sends in the place of a value."""

    message: str


class HostCollectives(Collectives):
    """By way of the CPU's memory: for devices that compute there, and for GPUs that several ranks share.

    Of bfloat16 the sum is carried in float32 and rounded once.
    """

    capturable = False

    def __init__(self, comm: Any) -> None:
        self._comm, self._size = comm, comm.Get_size()

    def _all_reduce(self, device: Device, arrays: Sequence[Array]) -> None:
        for dtype in dict.fromkeys(np.dtype(array.dtype) for array in arrays):
            mine = [array for array in arrays if array.dtype == dtype]
            total = self._total(np.concatenate([device.download(array).reshape(-1) for array in mine]))
            ends = np.cumsum([array.size for array in mine])
            for array, values in zip(mine, np.split(total, ends[:-1]), strict=True):
                device.write(array, values.reshape(array.shape))

    @np.errstate(all="ignore")  # NaN and infinity are found in the sum
    def _total(self, flat: np.ndarray) -> np.ndarray:
        pieces = np.zeros((self._size, -(-flat.size // self._size)), flat.dtype)
        pieces.reshape(-1)[: flat.size] = flat
        of_ranks = np.empty_like(pieces)  # of this rank's piece
        self._comm.Alltoall(pieces.view(np.uint8), of_ranks.view(np.uint8))
        total = of_ranks[0].astype(np.promote_types(flat.dtype, np.float32))
        for other in of_ranks[1:]:
            total += other
        self._comm.Allgather(total.astype(flat.dtype).view(np.uint8), pieces.view(np.uint8))
        return pieces.reshape(-1)[: flat.size]

    def _all_gather(self, device: Device, array: Array) -> Array:
        mine = np.ascontiguousarray(device.download(array))
        found = np.empty((self._size, *mine.shape), mine.dtype)
        self._comm.Allgather(mine, found)
        return device.upload(found)


class MpiCommunicator(Communicator):
    """The ranks of MPI's world. `comm` is of mpi4py."""

    def __init__(self, comm: Any, host: str) -> None:
        self._values = comm.Dup()
        self.collectives: Collectives = HostCollectives(comm.Dup())
        self.rank, self.size, self.host = comm.Get_rank(), comm.Get_size(), host
        processes = self._values.allgather((host, os.getpid()))
        self.members = [f"{rank} on {name} (process {number})" for rank, (name, number) in enumerate(processes)]
        local = [rank for rank, (name, _) in enumerate(processes) if name == host]
        self.local_rank, self.local_size = local.index(self.rank), len(local)
        self._failures: list[_Failure | None] = []  # of each rank, once there is one

    def on(self, device: Device) -> Communicator:
        gpu = device.gpu_identity()
        gpus = self.all_gather((self.host, gpu))
        if gpu is not None and len(set(gpus)) == self.size:  # NCCL has one rank a GPU
            self.collectives = NcclCollectives(self.broadcast(new_identity), self.rank, self.size)
        return self

    def all_gather(self, value: Value) -> list[Value]:
        if any(self._failures):
            raise PeerError(self._cause)
        found = self._values.allgather(value)
        self._failures = [answer if isinstance(answer, _Failure) else None for answer in found]
        if any(self._failures):
            raise PeerError(self._cause)
        return found

    @property
    def _cause(self) -> str:
        return next(failure.message for failure in self._failures if failure)

    def broadcast(self, make: Callable[[], Value]) -> Value:
        made = make() if self.leads else None
        self.all_gather(None)  # where it cannot be made the others hear of that here
        return self._values.bcast(made)

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except PeerError:
            raise
        except BaseException as error:
            self._abort(f"{type(error).__name__}: {error}")

    @contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
            self.all_gather(None)
        except PeerError:
            raise
        except BaseException as error:
            self.fail(error)
            if self.rank != next(rank for rank, failure in enumerate(self._failures) if failure):
                raise PeerError(self._cause) from error  # of several the first one speaks
            raise

    def fail(self, error: BaseException) -> None:
        if any(self._failures):
            return
        mine = _Failure(f"{self.label}{error}")
        timer = threading.Timer(PATIENCE, self._abort, [str(error) or type(error).__name__])
        timer.daemon = True
        timer.start()
        found = self._values.allgather(mine)
        timer.cancel()
        self._failures = [answer if isinstance(answer, _Failure) else None for answer in found]

    def _abort(self, message: str) -> None:
        """Ends every rank at once."""
        print(f"error: {self.label}{message}", file=sys.stderr, flush=True)
        self._values.Abort(1)
        os._exit(1)  # MPI ends this process, too, sooner or later
