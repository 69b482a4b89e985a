"""What the tests of kernels share: kernels to launch, launches that are right, a device that only takes notes.

The kernels in tests/kernels/ are made for these tests; most of them are wrong on purpose.
"""

import functools
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segnet_scratch.device import Device, HostDevice
from segnet_scratch.errors import CompileError
from segnet_scratch.kernels import ElementTypes, Kernel, host, launch
from segnet_scratch.kernels.host import HostOptions
from segnet_scratch.kernels.signature import parse_kernels
from segnet_scratch.kernels.source import read_source

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FLOAT32 = ElementTypes.of(np.dtype(np.float32))
FLOAT64 = ElementTypes.of(np.dtype(np.float64))
INCLUDE = '#include "common/types.cuh"\n'


def has_compiler() -> bool:
    try:
        host.find_compiler()
    except CompileError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler for the host device")


@functools.cache
def written_kernel(name: str) -> Kernel:
    """A kernel of tests/kernels/."""
    return next(
        k for path in (TESTS / "kernels").glob("*.cu") for k in parse_kernels(read_source(path)) if k.name == name
    )


def run(
    name: str, *arguments: Any, grid: Any = 1, block: Any = 1, shared: int = 0, types=FLOAT32, **options: Any
) -> None:
    """Launches a kernel of tests/kernels/ on a host device with these HostOptions."""
    launch(HostDevice(HostOptions(**options)), written_kernel(name), grid, block, arguments, types, shared)


def line_of(file: str, text: str) -> int:
    """The line of a file of tests/kernels/ that holds the text."""
    lines = (TESTS / "kernels" / file).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, because it may crash or must start with empty caches."""
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def parse(folder: Path, text: str, name: str = "written.cu") -> tuple[Kernel, ...]:
    """The kernels of a .cu file with this text."""
    path = folder / name
    path.write_text(text)
    return parse_kernels(read_source(path))


class Recorder(HostDevice):
    """A host device that notes a launch instead of carrying it out."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def execute(self, *launched: Any) -> None:
        self.launches.append(launched)


@dataclass(frozen=True)
class Call:
    """A launch, right or wrong, of one kernel."""

    kernel: Kernel
    arguments: tuple[Any, ...]
    grid: Any = (1, 1, 1)
    block: Any = (1, 1, 1)
    shared: Any = 0
    types: ElementTypes = FLOAT32

    def put(self, name: str, value: Any) -> "Call":
        """The same with another value for one argument."""
        index = [p.name for p in self.kernel.parameters].index(name)
        return replace(self, arguments=(*self.arguments[:index], value, *self.arguments[index + 1 :]))

    @property
    def arrays(self) -> list[tuple[Any, np.ndarray]]:
        """The pointer parameters and their arrays."""
        return [(p, a) for p, a in zip(self.kernel.parameters, self.arguments, strict=True) if p.pointer]

    def scalars(self, kinds: str) -> list[Any]:
        """The scalar parameters whose type is of these kinds ("i", "u", "f")."""
        return [p for p in self.kernel.parameters if not p.pointer and p.dtype(self.types).kind in kinds]

    def launch(self, device: Device) -> None:
        launch(device, self.kernel, self.grid, self.block, self.arguments, self.types, self.shared)


SENTINEL = 0xA7


def sentinel_array(shape: Any, dtype: Any) -> np.ndarray:
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = SENTINEL
    return array


def valid_call(kernel: Kernel, types: ElementTypes | None = None) -> Call:
    """A launch that the gate lets through, derived from the signature alone.

    Integers are 4 or 6, so that arrays have sizes that are no primes and can be transposed.
    """
    types = types or ElementTypes.named(kernel.source.elements[0])
    numbers = {p.name: 6 if p.c_type == "int64" else 4 for p in kernel.parameters if not p.pointer}
    arguments: list[Any] = []
    for p in kernel.parameters:
        if p.pointer:
            arguments.append(sentinel_array(p.extent_shape(numbers) if p.extent_code else 4, p.dtype(types)))
        else:
            arguments.append(numbers[p.name] if p.dtype(types).kind in "iu" else 0.5)
    return Call(kernel, tuple(arguments), types=types)
