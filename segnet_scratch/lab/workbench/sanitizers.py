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
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import CompileError, KernelFault
from segnet_scratch.lab.workbench.execution import launch_once
from segnet_scratch.lab.workbench.guards import ARRAYS_MARK, FIRST, GUARD, place
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
        _write(setup, Path(name))
        code = f"from {__name__} import run_sanitized; run_sanitized()"
        command = [sys.executable, "-P", "-c", code, name]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        reports = read_reports(result.stderr, setup.kernel.name)
        if not reports and result.returncode != 0:
            end = result.stderr.strip().expandtabs()[-2000:].splitlines()
            raise CompileError(f"the sanitized run of {setup.kernel.name} failed:", *end)
        return reports + [fault.read_text() for fault in Path(name).glob("fault")]


def _write(setup: Setup, folder: Path) -> None:
    job = {
        "kernel": f"{setup.kernel.source.path}:{setup.kernel.name}",
        "type": setup.types.storage.name,
        "scalars": setup.scalars,
        "shapes": setup.shapes,
        "geometry": [setup.grid, setup.block, setup.shared],
        "null": [name for name, array in setup.contents.items() if array is None],
    }
    (folder / "job.json").write_text(json.dumps(job))
    present: dict[str, Any] = {name: array for name, array in setup.contents.items() if array is not None}
    np.savez(folder / "contents.npz", **present)


def _read(folder: Path) -> Setup:
    job: dict[str, Any] = json.loads((folder / "job.json").read_text())
    contents = dict.fromkeys(job["null"]) | dict(np.load(folder / "contents.npz"))
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
    guarded.forbid()
    try:
        launch_once(setup, arrays, device)
    except KernelFault as error:
        (folder / "fault").write_text(str(error))
    os._exit(0)  # nothing is left to be done, and Python's end under a sanitizer is slow


def sanitized_environment() -> dict[str, str]:
    """The environment of a Python that can load sanitized kernels: the sanitizer's library comes before all others.

    CompileError where the compiler has none.
    """
    return {**os.environ, **OPTIONS, "LD_PRELOAD": str(sanitizer_runtime()), "PYTHONPATH": python_path()}


def python_path() -> str:
    """PYTHONPATH of a process that is to find this package."""
    package = str(Path(__file__).resolve().parents[3])
    return os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])


def read_reports(stderr: str, kernel: str) -> list[str]:
    """What the sanitizers found in a run of `kernel`; nothing when the list is empty."""
    reports = [
        _with_line(kernel, f"undefined behaviour: {message}", path, int(line))
        for path, line, message in dict.fromkeys(_UNDEFINED.findall(stderr))
    ]
    kind = _KIND.search(stderr)
    return [*reports, _memory_report(kernel, kind.group(1), stderr)] if kind else reports


def _memory_report(kernel: str, kind: str, stderr: str) -> str:
    what = "accesses memory that is nobody's" if kind in ("SEGV", "BUS") else kind
    if access := _ACCESS.search(stderr):
        verb = "reads" if access.group(1) == "READ" else "writes"
        what = f"{verb} {access.group(2)} bytes {_place(int(access.group(3), 16), stderr, kind)}"
    if thread := _THREAD.search(stderr):
        what = f"{thread.group(1)} {what}"
    for path, line in _FRAME.findall(stderr):
        if Path(path).stem != "host_runtime":
            return _with_line(kernel, what, path, int(line))
    return f"{what}; {stderr.strip()[:500]}"


def _place(address: int, stderr: str, kind: str) -> str:
    """Where an address lies: beside which array of those that were told of last."""
    arrays = stderr.rpartition(ARRAYS_MARK)[2].partition("\n")[0] if ARRAYS_MARK in stderr else "{}"
    for name, (start, nbytes, itemsize) in json.loads(arrays).items():
        if start - GUARD * itemsize <= address < start + nbytes + GUARD * itemsize:
            where = "before the start" if address < start else "past the end"
            return f"{where} of {name}, at {name}[{(address - start) // itemsize}] of {nbytes // itemsize} elements"
    return f"where no array lies ({kind}; shared memory past its end, or a stray pointer)"


def _with_line(kernel: str, what: str, path: str, line: int) -> str:
    """`add.cu:7: ...` with the line of the source below."""
    file = Path(path)
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    shown = f"\n    {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
    return f"{file.name}:{line}: {kernel}: {what}{shown}"
