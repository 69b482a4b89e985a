"""Runs a kernel built with AddressSanitizer and UndefinedBehaviorSanitizer, which name the line of the `.cu` file.

The sanitizer's library has to be in a process before anything else, so the run happens in a Python of its own, started
with the library preloaded. It finds the launch in a folder.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.device import HostDevice
from segnet_scratch.errors import CompileError, KernelFault
from segnet_scratch.kernels import ElementTypes
from segnet_scratch.kernels.host import HostOptions, build, sanitizer_runtime
from segnet_scratch.kernels.workbench.execution import launch_once
from segnet_scratch.kernels.workbench.memory import FIRST, GUARD, Placement
from segnet_scratch.kernels.workbench.setup import Setup, load_kernel

_OPTIONS = {
    # Python itself leaks at exit; fibers move between stacks.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_abort=1:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=0",
}
_ACCESS = re.compile(r"^(READ|WRITE) of size (\d+) at (0x[0-9a-f]+)", re.MULTILINE)
_KIND = re.compile(r"ERROR: AddressSanitizer: (\S+)")
_FRAME = re.compile(r"^\s*#\d+ 0x[0-9a-f]+ (?:in (?:.*?) )?(/[^\s:]+):(\d+)", re.MULTILINE)
_THREAD = re.compile(r"^segnet: (.*)$", re.MULTILINE)
_UNDEFINED = re.compile(r"^(\S+?):(\d+):\d+: runtime error: (.*)$", re.MULTILINE)


def find_memory_errors(setup: Setup) -> list[str]:
    """What the sanitizers report; nothing when the list is empty. CompileError where the compiler has none."""
    runtime = sanitizer_runtime()
    build(setup.kernel.source, setup.types, sanitize=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(setup, folder)
        package = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        result = subprocess.run(
            [sys.executable, "-P", "-c", f"from {__name__} import run_sanitized; run_sanitized()", name],
            env={**os.environ, **_OPTIONS, "LD_PRELOAD": str(runtime), "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
        )
        return _read_reports(setup, result, folder)


def _read_reports(setup: Setup, result: subprocess.CompletedProcess[str], folder: Path) -> list[str]:
    reports = [
        _with_line(setup, f"undefined behaviour: {message}", path, int(line))
        for path, line, message in dict.fromkeys(_UNDEFINED.findall(result.stderr))
    ]
    kind = _KIND.search(result.stderr)
    if kind:
        addresses = json.loads((folder / "addresses.json").read_text())
        reports.append(_memory_report(setup, kind.group(1), result.stderr, addresses))
    elif result.returncode != 0:
        raise CompileError(f"the sanitized run of {setup.kernel.name} failed:\n{result.stderr.strip()[-2000:]}")
    if (folder / "fault").is_file():
        reports.append((folder / "fault").read_text())
    return reports


def _memory_report(setup: Setup, kind: str, stderr: str, addresses: dict[str, list[int]]) -> str:
    access = _ACCESS.search(stderr)
    what = "accesses memory that is nobody's" if kind in ("SEGV", "BUS") else kind
    if access:
        verb = "reads" if access.group(1) == "READ" else "writes"
        what = f"{verb} {access.group(2)} bytes {_place(setup, int(access.group(3), 16), addresses, kind)}"
    thread = _THREAD.search(stderr)
    if thread:
        what = f"{thread.group(1)} {what}"
    for path, line in _FRAME.findall(stderr):
        if Path(path).name != "host_runtime.h":
            return _with_line(setup, what, path, int(line))
    return f"{what}; {stderr.strip()[:500]}"


def _place(setup: Setup, address: int, addresses: dict[str, list[int]], kind: str) -> str:
    """Where an address lies: beside which array."""
    for name, (start, size) in addresses.items():
        itemsize = setup.dtype(name).itemsize
        guard = GUARD * itemsize
        if start - guard <= address < start + size + guard:
            where = "before the start" if address < start else "past the end"
            return f"{where} of {name}, at {name}[{(address - start) // itemsize}] of {size // itemsize} elements"
    return f"where no array lies ({kind}; shared memory past its end, or a stray pointer)"


def _with_line(setup: Setup, what: str, path: str, line: int) -> str:
    """`add.cu:7: ...` with the line of the source below."""
    file = Path(path)
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    shown = f"\n    {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
    return f"{file.name}:{line}: {setup.kernel.name}: {what}{shown}"


def _write(setup: Setup, folder: Path) -> None:
    job = {
        "kernel": f"{setup.kernel.source.path}:{setup.kernel.name}",
        "type": setup.types.storage.name,
        "scalars": setup.scalars,
        "shapes": setup.shapes,
        "contents": {name: array is not None for name, array in setup.contents.items()},
        "geometry": [setup.grid, setup.block, setup.shared],
    }
    (folder / "job.json").write_text(json.dumps(job))
    for name, array in setup.contents.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)


def _read(folder: Path) -> Setup:
    job: dict[str, Any] = json.loads((folder / "job.json").read_text())
    contents = {
        name: np.load(folder / f"{name}.npy", allow_pickle=False) if present else None
        for name, present in job["contents"].items()
    }
    grid, block, shared = job["geometry"]
    types = ElementTypes.of(np.dtype(job["type"]))
    shapes = {name: tuple(shape) for name, shape in job["shapes"].items()}
    return Setup(load_kernel(job["kernel"]), types, job["scalars"], contents, shapes, tuple(grid), tuple(block), shared)


def run_sanitized() -> None:
    """The process under the sanitizers: one run of the launch in the folder argv[1], guard zones out of bounds."""
    os.environ.pop("LD_PRELOAD")  # not for the compiler's --version
    folder = Path(sys.argv[1])
    setup = _read(folder)
    placement = Placement(setup, FIRST, lambda size: np.empty(size, np.uint8))
    poison = ctypes.CDLL(None).__asan_poison_memory_region
    poison.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    addresses = {}
    for name, buffer in placement.buffers.items():
        guard = GUARD * buffer.itemsize
        poison(buffer.ctypes.data, guard)
        poison(buffer.ctypes.data + buffer.nbytes - guard, guard)
        addresses[name] = [buffer.ctypes.data + guard, buffer.nbytes - 2 * guard]
    (folder / "addresses.json").write_text(json.dumps(addresses))
    try:
        launch_once(setup, placement, HostDevice(HostOptions(workers=1, sanitize=True)))
    except KernelFault as error:
        (folder / "fault").write_text(str(error))
    os._exit(0)  # nothing is left to be done, and Python's end under a sanitizer is slow
