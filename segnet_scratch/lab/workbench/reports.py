"""Reads what AddressSanitizer and UndefinedBehaviorSanitizer write: line of the `.cu` file, thread, array."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from segnet_scratch.lab.workbench.guards import GUARD, Region
from segnet_scratch.runtime.host import sanitizer_runtime

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
