"""The launches behind an op: noted while it runs, or taken down with all they read, to be run again by themselves.

The second is for failures. A launch by itself can go through the workbench of single kernels, which finds out who
writes an element, which threads disturb each other, and what line accesses memory that is not an array's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.proof.compare import Defect
from segnet_scratch.lab.workbench.execution import Executor
from segnet_scratch.lab.workbench.guards import FIRST
from segnet_scratch.lab.workbench.races import describe_writers, find_race
from segnet_scratch.lab.workbench.sanitizers import find_memory_errors
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.ops.cases import Case, Inputs, Row, empty_outputs
from segnet_scratch.ops.convolution.conv2d_hopper import tiles_on
from segnet_scratch.ops.convolution.conv2d_hopper_cases import HopperRow
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.runtime.devices import Device, HostDevice, NumpyDevice
from segnet_scratch.runtime.geometry import runs_alone
from segnet_scratch.runtime.launch import Launch, find_kernel
from segnet_scratch.runtime.observe import Observer, observe


class DryDevice(NumpyDevice):
    """Passes for the host device, but notes a launch instead of carrying it out; it needs no compiler."""

    name = "host"
    runs_kernels = True

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def execute(self, launch: Launch) -> None:
        self.launches.append(launch)


def kernels_of(row: Row, cases: Sequence[Case] = ()) -> set[str]:
    """The kernels that these cases of a row launch, or all its fixed ones; nothing runs."""
    device = DryDevice()
    for index, case in enumerate(cases or row.cases()):
        op = row.plan(case, row.elements[0])
        op.run(device, _buffers(op, row.inputs(op, case, row.generator(0, index))))
    return {launch.kernel.name for launch in device.launches}


def _buffers(op: Op, inputs: Inputs) -> Buffers:
    """Inputs, outputs and workspace of an op, as NumPy arrays."""
    workspace = {name: np.zeros(s.shape, s.dtype) for name, s in op.workspace.items()}
    return Buffers(**inputs, **empty_outputs(op), **workspace)


def rows_on(device: Device, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows whose kernels the device has the instructions for; Hopper's not where SEGNET_HOPPER=0 forbids them."""
    if device.architecture is None:
        return rows
    hopper = tiles_on(device) is not None
    return tuple(
        row
        for row in rows
        if all(device_has(device, name) for name in kernels_of(row, row.cases()[:1]))
        and (hopper or not isinstance(row, HopperRow))
    )


def device_has(device: Device, kernel: str) -> bool:
    """Can this kernel be compiled for the device?"""
    return device.architecture is None or find_kernel(kernel).source.compiles_for(device.architecture)


class _Told(Observer):
    """Tells of each launch before it is made."""

    def __init__(self, tell: Callable[[Launch], None]) -> None:
        self._tell = tell

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        self._tell(launch)
        run()


@contextmanager
def noting_launches() -> Iterator[list[str]]:
    """The list that is given grows by the name of each kernel that is launched inside."""
    names: list[str] = []
    with observe(_Told(lambda launch: names.append(launch.kernel.name))):
        yield names


class Replay:
    """The launches of one op on the host device, each ready to be run again."""

    def __init__(self, op: Op, inputs: Inputs, device: HostDevice) -> None:
        self._arrays = _buffers(op, {name: None if a is None else a.copy() for name, a in inputs.items()})
        self._device = HostDevice()
        self._launches: list[tuple[Setup, dict[str, int]]] = []  # and the addresses of its arrays, by parameter
        with observe(_Told(self._take_down)):
            op.run(device, self._arrays)
        self._alone = [setup for setup, _ in self._launches if runs_alone(setup.kernel)]

    def _take_down(self, launch: Launch) -> None:
        """With the contents of its arrays before it."""
        kernel = launch.kernel
        if any(p.tensor_map for p in kernel.parameters):  # a setup has none: it is not run again
            return
        pairs = list(zip(kernel.parameters, launch.arguments, strict=True))
        scalars = {p.name: value.item() for p, value in pairs if not p.pointer}
        contents = {p.name: None if a is None else np.copy(a) for p, a in pairs if p.pointer}
        shapes = {name: () if a is None else a.shape for name, a in contents.items()}
        setup = Setup(kernel, launch.types, scalars, contents, shapes, launch.grid, launch.block, launch.shared)
        self._launches.append((setup, {p.name: a.ctypes.data for p, a in pairs if p.pointer and a is not None}))

    def writer(self, defect: Defect) -> list[str]:
        """The kernel that wrote an array of the op last, and the block and thread behind the element."""
        array = getattr(self._arrays, defect.array)
        for setup, addresses in reversed(self._launches):
            written = [n for n, at in addresses.items() if at == array.ctypes.data and setup.role(n) == "updated"]
            if not written:
                continue
            lines = [f"{defect.array} is written by {_named(setup)}"]
            if defect.element is not None and runs_alone(setup.kernel):
                element = int(np.ravel_multi_index(defect.element, array.shape))
                lines += describe_writers(Executor(setup, self._device), written[0], element)
            return lines
        return []

    def race(self, shuffles: int) -> list[str]:
        """A report on the first launch whose result depends on the order of threads or blocks."""
        for setup in self._alone:
            executor = Executor(setup, self._device)
            if report := find_race(executor, executor.run(FIRST), shuffles):
                return f"{_named(setup)}: {report}".split("\n")
        return []

    def memory_errors(self) -> list[str]:
        """What the sanitizers say to the first launch that they object to; nothing where there are none."""
        try:
            return next((errors for setup in self._alone if (errors := find_memory_errors(setup))), [])
        except CompileError:
            return []


def _named(setup: Setup) -> str:
    """`add_forward (add.cu:7)`."""
    return f"{setup.kernel.name} ({setup.kernel.source.path.name}:{setup.kernel.line})"
