"""The launches behind an op: noted while it runs, or taken down with all they read, to be run again by themselves.

The second is for failures. A launch by itself can go through the workbench of single kernels, which finds out who
writes an element, which threads disturb each other, and what line accesses memory that is not an array's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.proof.compare import Defect
from segnet_scratch.lab.proof.misuse import Recorder
from segnet_scratch.lab.workbench.execution import Executor
from segnet_scratch.lab.workbench.races import describe_writers, find_race
from segnet_scratch.lab.workbench.sanitizers import find_memory_errors
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.ops.cases import Case, Inputs, Row, empty_outputs
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.runtime.devices import Device, HostDevice
from segnet_scratch.runtime.geometry import runs_alone
from segnet_scratch.runtime.launch import Launch, find_kernel
from segnet_scratch.runtime.observe import Listener, observe


def kernels_of(row: Row, cases: Sequence[Case] = ()) -> set[str]:
    """The kernels that these cases of a row launch, or all its fixed ones; nothing runs."""
    recorder = Recorder()
    for index, case in enumerate(cases or row.cases()):
        op = row.plan(case, row.elements[0])
        inputs = row.inputs(op, case, row.generator(0, index))
        workspace = {name: np.empty(s.shape, s.dtype) for name, s in op.workspace.items()}
        op.run(recorder, Buffers(**inputs, **empty_outputs(op), **workspace))
    return {launch.kernel.name for launch in recorder.launches}


def rows_on(device: Device, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows whose kernels the device has the instructions for; not every GPU has tensor cores, few have Hopper's."""
    if device.architecture is None:
        return rows
    found = [row for row in rows if all(device_has(device, name) for name in kernels_of(row, row.cases()[:1]))]
    return rows if len(found) == len(rows) else tuple(found)


def device_has(device: Device, kernel: str) -> bool:
    """Can this kernel be compiled for the device?"""
    return device.architecture is None or find_kernel(kernel).source.compiles_for(device.architecture)


class _Names(Listener):
    """The names of the kernels that are launched."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        self.names.append(launch.kernel.name)
        run()


@contextmanager
def noting_launches() -> Iterator[list[str]]:
    """The list that is given grows by the name of each kernel that is launched inside."""
    listener = _Names()
    with observe(listener):
        yield listener.names


class _Recorder(Listener):
    """Takes down each launch on the host device, with the contents of its arrays before it."""

    def __init__(self) -> None:
        self.setups: list[Setup] = []
        self.addresses: list[dict[str, int]] = []  # of the arrays of each launch, by parameter

    def launch(self, launch: Launch, run: Callable[[], None]) -> None:
        kernel = launch.kernel
        if not any(parameter.tensor_map for parameter in kernel.parameters):  # a setup has none: it is not run again
            pairs = list(zip(kernel.parameters, launch.arguments, strict=True))
            scalars = {p.name: value.item() for p, value in pairs if not p.pointer}
            contents = {p.name: None if a is None else np.copy(a) for p, a in pairs if p.pointer}
            shapes = {name: () if a is None else a.shape for name, a in contents.items()}
            geometry = launch.grid, launch.block, launch.shared
            self.setups.append(Setup(kernel, launch.types, scalars, contents, shapes, *geometry))
            self.addresses.append({p.name: a.ctypes.data for p, a in pairs if p.pointer and a is not None})
        run()


class Replay:
    """The launches of one op on the host device, each ready to be run again."""

    def __init__(self, op: Op, inputs: Inputs, device: HostDevice) -> None:
        recorder = _Recorder()
        self._arrays: dict[str, Any] = {name: None if a is None else a.copy() for name, a in inputs.items()}
        self._arrays |= empty_outputs(op) | {name: np.zeros(s.shape, s.dtype) for name, s in op.workspace.items()}
        with observe(recorder):
            op.run(device, Buffers(**self._arrays))
        self._device = HostDevice()
        self._launches = list(zip(recorder.setups, recorder.addresses, strict=True))
        self._alone = [setup for setup in recorder.setups if runs_alone(setup.kernel)]

    def writer(self, defect: Defect) -> list[str]:
        """The kernel that wrote an array of the op last, and the block and thread behind the element."""
        array = self._arrays[defect.array]
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
            report = find_race(Executor(setup, self._device), shuffles)
            if report is not None:
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
