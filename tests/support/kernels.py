"""What the tests of kernels share: kernels to launch, launches that are right, a device that only takes notes.

The kernels in tests/kernels/ are made for these tests; most of them are wrong on purpose.
"""

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.proof.launches import DryDevice
from segnet_scratch.lab.proof.parts.base import reason_against
from segnet_scratch.lab.proof.parts.gate import FLOAT32, FLOAT64, SENTINEL, Call, sentinel_array, valid_call
from segnet_scratch.runtime import host
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.launch import Kernel, launch
from segnet_scratch.runtime.signature import parse_kernels
from segnet_scratch.runtime.source import read_source
from support import ROOT, TESTS

__all__ = ["FLOAT32", "FLOAT64", "SENTINEL", "Call", "DryDevice", "sentinel_array", "valid_call"]  # from the package

INCLUDE = '#include "common/types.cuh"\n'


def has_compiler() -> bool:
    try:
        host.find_compiler()
    except CompileError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler for the host device")
needs_sanitizers = pytest.mark.skipif(
    bool(reason_against(host.sanitizer_runtime)), reason="the C++ compiler brings no AddressSanitizer"
)


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
        timeout=300,  # of a hang: what takes longest, sanitized kernels, takes half a minute
    )


def parse(folder: Path, text: str, name: str = "written.cu") -> tuple[Kernel, ...]:
    """The kernels of a .cu file with this text."""
    path = folder / name
    path.write_text(text)
    return parse_kernels(read_source(path))


FILL = (
    INCLUDE
    + """
extern "C" __global__ void fill(
    float* x,  // (n)
    int n) {
    FOR_EACH_INDEX(i, n) x[i] = VALUE;
}
"""
)


def filled(kernel: Kernel) -> float:
    """What the kernel `fill` writes."""
    x = np.zeros(4, np.float32)
    launch(HostDevice(), kernel, 1, 4, (x, 4), FLOAT32)
    assert (x == x[0]).all()
    return float(x[0])
