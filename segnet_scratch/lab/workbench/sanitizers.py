"""Runs a kernel built with AddressSanitizer and UndefinedBehaviorSanitizer, which name the line of the `.cu` file.

The sanitizer's library has to be in a process before anything else, so the run happens in a Python of its own, started
with the library preloaded. It finds the launch in a folder.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import CompileError, KernelFault
from segnet_scratch.lab.workbench.execution import launch_once
from segnet_scratch.lab.workbench.guards import FIRST, GUARD, Region, place
from segnet_scratch.lab.workbench.setup import Setup, load_kernel
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.host import HostOptions, build, sanitizer_runtime
from segnet_scratch.runtime.launch import ElementTypes

OPTIONS = {
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
    environment = sanitized_environment()
    build(setup.kernel.source, setup.types, sanitize=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(setup, folder)
        result = subprocess.run(
            [sys.executable, "-P", "-c", f"from {__name__} import run_sanitized; run_sanitized()", name],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        return _read_reports(setup, result, folder)


def _read_reports(setup: Setup, result: subprocess.CompletedProcess[str], folder: Path) -> list[str]:
    regions = folder / "regions.json"  # missing where the process did not get as far
    arrays = json.loads(regions.read_text()) if regions.is_file() else {}
    reports = read_reports(result.stderr, setup.kernel.name, {name: Region(*r) for name, r in arrays.items()})
    if not reports and result.returncode != 0:
        raise CompileError(f"the sanitized run of {setup.kernel.name} failed:\n{result.stderr.strip()[-2000:]}")
    if (folder / "fault").is_file():
        reports.append((folder / "fault").read_text())
    return reports


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
    device = HostDevice(HostOptions(workers=1, sanitize=True))
    guarded, arrays = place(setup, device, FIRST)
    (folder / "regions.json").write_text(json.dumps({n: astuple(r) for n, r in guarded.forbid().items()}))
    try:
        launch_once(setup, arrays, device)
    except KernelFault as error:
        (folder / "fault").write_text(str(error))
    os._exit(0)  # nothing is left to be done, and Python's end under a sanitizer is slow


def sanitized_environment() -> dict[str, str]:
    """The environment of a Python that can load sanitized kernels: the sanitizer's library comes before all others.

    CompileError where the compiler has none.
    """
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **OPTIONS, "LD_PRELOAD": str(sanitizer_runtime()), "PYTHONPATH": path}


def read_reports(stderr: str, kernel: str, arrays: Mapping[str, Region]) -> list[str]:
    """What the sanitizers found in a run of `kernel` on these arrays; nothing when the list is empty."""
    reports = [
        _with_line(kernel, f"undefined behaviour: {message}", path, int(line))
        for path, line, message in dict.fromkeys(_UNDEFINED.findall(stderr))
    ]
    kind = _KIND.search(stderr)
    if kind:
        reports.append(_memory_report(kernel, kind.group(1), stderr, arrays))
    return reports


def _memory_report(kernel: str, kind: str, stderr: str, arrays: Mapping[str, Region]) -> str:
    access = _ACCESS.search(stderr)
    what = "accesses memory that is nobody's" if kind in ("SEGV", "BUS") else kind
    if access:
        verb = "reads" if access.group(1) == "READ" else "writes"
        what = f"{verb} {access.group(2)} bytes {_place(int(access.group(3), 16), arrays, kind)}"
    thread = _THREAD.search(stderr)
    if thread:
        what = f"{thread.group(1)} {what}"
    for path, line in _FRAME.findall(stderr):
        if Path(path).name != "host_runtime.h":
            return _with_line(kernel, what, path, int(line))
    return f"{what}; {stderr.strip()[:500]}"


def _place(address: int, arrays: Mapping[str, Region], kind: str) -> str:
    """Where an address lies: beside which array."""
    for name, region in arrays.items():
        guard = GUARD * region.itemsize
        if region.start - guard <= address < region.start + region.nbytes + guard:
            where = "before the start" if address < region.start else "past the end"
            element = (address - region.start) // region.itemsize
            return f"{where} of {name}, at {name}[{element}] of {region.nbytes // region.itemsize} elements"
    return f"where no array lies ({kind}; shared memory past its end, or a stray pointer)"


def _with_line(kernel: str, what: str, path: str, line: int) -> str:
    """`add.cu:7: ...` with the line of the source below."""
    file = Path(path)
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    shown = f"\n    {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
    return f"{file.name}:{line}: {kernel}: {what}{shown}"
