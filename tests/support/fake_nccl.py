"""A stand-in for CuPy's NCCL, and for the other ranks: mirrors, which do what this rank does.

`calls` are what was asked of it, with how many kernels had been launched then. An address must be the begin of an array
that lives, a count all of its elements, a type its own. Work goes on the stream that is named, into a graph where that
is recorded, and races are found as those of kernels are (fake_streams.py).
"""

from types import SimpleNamespace

import numpy as np

from segnet_scratch.parallel.communicator import Communicator
from segnet_scratch.parallel.mpi import NcclCollectives, new_identity
from segnet_scratch.runtime.precision import BFLOAT16

TYPES = {7: np.dtype(np.float32), 8: np.dtype(np.float64), 9: BFLOAT16}  # as nccl.h numbers them
SUM = 0


class FakeNccl(SimpleNamespace):
    """What stands in `cupy.cuda.nccl`."""

    def __init__(self, cupy):
        super().__init__(available=True, NCCL_SUM=SUM, NCCL_FLOAT32=7, NCCL_FLOAT64=8, NCCL_BFLOAT16=9)
        self.cupy, self.calls, self.group, self.made = cupy, [], None, []

    def get_unique_id(self):
        return "an identity"

    def groupStart(self):
        assert self.group is None, "a group in a group"
        self.group = []

    def groupEnd(self):
        assert self.group is not None
        group, self.group = self.group, None
        for run in group:
            run()

    def NcclCommunicator(self, size, identity, rank):
        assert identity == "an identity"
        assert 0 <= rank < size
        self.made.append((size, rank))
        return FakeCommunicator(self, size)


class FakeCommunicator:
    def __init__(self, nccl, size):
        self.nccl, self.size = nccl, size

    def array(self, address, count, kind):
        found = [a for a in list(self.nccl.cupy.views.values()) if a.data.ptr == address and a.size == count]
        assert found, "no array of so many elements begins there"
        assert found[-1].dtype == TYPES[kind], f"an array of {found[-1].dtype} is said to be {TYPES[kind]}"
        assert found[-1].flags.c_contiguous
        return found[-1]

    def ask(self, what, stream, count, arrays, writes, carry_out):
        cupy = self.nccl.cupy
        (line,) = (s for s in cupy.timeline.streams.values() if s.ptr == stream)
        call = {"what": what, "stream": line.number, "count": count, "launches": len(cupy.launches)}
        call |= {"in_group": self.nccl.group is not None, "dtype": arrays[0].dtype}
        self.nccl.calls.append(SimpleNamespace(**call))

        def run():
            cupy.work(what, arrays, writes, carry_out, line)

        run() if self.nccl.group is None else self.nccl.group.append(run)

    def allReduce(self, source, target, count, kind, operation, stream):
        assert (operation, source) == (SUM, target), "sums, in place"
        self.ask("allReduce", stream, count, [self.array(source, count, kind)], [True], self.times)

    def times(self, values):
        values[...] = values * self.size

    def allGather(self, source, target, count, kind, stream):
        arrays = [self.array(source, count, kind), self.array(target, count * self.size, kind)]
        self.ask("allGather", stream, count, arrays, [False, True], lambda one, all_: np.copyto(all_, one))


class Mirrors(Communicator):
    """Rank 0 of several that have the same images: together they make the step of one, but for rounding."""

    rank, host = 0, "here"

    def __init__(self, size):
        self.size, self.exchanged = size, 0

    def on(self, device):
        assert device.gpu_identity()
        self.collectives = NcclCollectives(new_identity(), 0, self.size)
        return self

    def all_gather(self, value):
        self.exchanged += 1
        return [value] * self.size
