"""Rows of an op table in which every kernel is wrong: tests/kernels/faulty.cu.

`python -m support.faulty_rows` is a worker process that knows them beside the rows of the project.
"""

import numpy as np

from segnet_scratch.lab.proof import table
from segnet_scratch.lab.proof.processes import main
from segnet_scratch.ops.cases import Case, Row
from segnet_scratch.ops.op import Op, spec
from segnet_scratch.runtime.launch import launch
from support.kernels import written_kernel

THREADS = 64


class FaultyOp(Op):
    """y (count) = x, or the 64 elements of each block turned round."""

    def __init__(self, kernel, count, dtype, turned):
        self.name, self.turned = kernel, turned
        self.inputs = {"x": spec((count,), dtype)}
        self.outputs, self.workspace, self.flops = {"y": spec((count,), dtype)}, {}, 0

    def launch(self, device, b):
        count = b.x.size
        if self.name == "faulty_context":  # as with CUDA, every later call fails
            device.synchronise = lambda: 1 / 0
            return
        launch(device, written_kernel(self.name), count // THREADS, THREADS, (b.x, b.y, count), self.types)

    def reference(self, b):
        b.y[...] = b.x.reshape(-1, THREADS)[:, ::-1].reshape(-1) if self.turned else b.x


class FaultyRow(Row):
    """One of the kernels; blocks of 64 threads, an element each."""

    op = FaultyOp
    exact = True

    def __init__(self, kernel, turned=False):
        self.name, self.turned = kernel, turned

    def cases(self):
        return [Case(f"{blocks} blocks", {"x": (blocks * THREADS,)}) for blocks in (1, 2, 3)]

    def random_case(self, rng):
        return Case("random", {"x": (int(rng.integers(1, 9)) * THREADS,)})

    def plan(self, case, dtype):
        return FaultyOp(self.name, *case["x"], np.dtype(dtype), self.turned)


KINDS = ("barrier", "read", "write", "variable", "value", "shift", "address", "end", "context")
ROWS = {kind: FaultyRow(f"faulty_{kind}") for kind in KINDS} | {"race": FaultyRow("faulty_race", turned=True)}

if __name__ == "__main__":
    table.ROWS = (*table.ROWS, *ROWS.values())
    main()
