"""Reads what ptxas, NVIDIA's assembler, says about the kernels it compiled (NVRTC's log with `--ptxas-options=-v`).

For each kernel there are three lines that matter:

    ptxas info    : Compiling entry function 'relu_forward' for 'sm_90'
    ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 16 registers, used 0 barriers, 256 bytes smem

A device function that was not inlined has a stack line of its own, after the kernel that calls it.
"""

import re
from dataclasses import dataclass, replace

from segnet_scratch.errors import CompileError

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
# What a compiler says unasked: warnings, and "Potential Performance Loss" where tensor-core work was serialised.
_REMARK = re.compile(r"\bwarning\s*[:#]|Performance Loss")


class LogError(CompileError):
    """What the compilers said is not what this file can read, or not about every kernel."""


@dataclass(frozen=True)
class Usage:
    """What one kernel, compiled for one pair of element type and architecture, takes of a multiprocessor."""

    kernel: str
    element: str  # "float32"; for tensor cores how they multiply, "tf32"
    architecture: str  # "sm_90"
    registers: int = 0  # of 32 bits, for each thread; at most 255
    spill_stores: int = 0  # bytes written to local memory, for each thread, because registers ran out
    spill_loads: int = 0  # bytes read back
    stack: int = 0  # bytes of local memory for each thread, spills included
    shared: int = 0  # bytes of static shared memory for each block
    barriers: int = 0


def parse_log(log: str, element: str) -> list[Usage]:
    """The kernels of a log, in its order. LogError where the log is not what this file expects."""
    usages: list[Usage] = []
    complete = True
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            _expect(complete, usages, line)
            usages.append(Usage(entry[1], element, entry[2]))
            complete = False
        elif frame := _FRAME.search(line):
            _expect(bool(usages), usages, line)
            stack, stores, loads = map(int, frame.groups())
            last = usages[-1]
            usages[-1] = replace(
                last,
                stack=max(last.stack, stack),
                spill_stores=last.spill_stores + stores,
                spill_loads=last.spill_loads + loads,
            )
        elif used := _USED.search(line):
            _expect(not complete, usages, line)
            complete = True
            usages[-1] = replace(
                usages[-1],
                registers=int(used[1]),
                # The cumulative size covers the functions that the kernel calls.
                stack=max(usages[-1].stack, _number(line, "bytes cumulative stack size")),
                shared=_number(line, "bytes smem"),
                barriers=_number(line, "barriers"),
            )
    _expect(complete, usages, "the end")
    return usages


def remarks(log: str) -> list[str]:
    """The lines with a compiler's warnings."""
    return [line.strip() for line in log.splitlines() if _REMARK.search(line)]


def _number(line: str, unit: str) -> int:
    found = re.search(rf"(\d+) {unit}", line)
    return int(found[1]) if found else 0


def _expect(condition: bool, usages: list[Usage], line: str) -> None:
    if not condition:
        after = f" after kernel {usages[-1].kernel}" if usages else ""
        raise LogError(f"cannot read the log of ptxas{after} at: {line.strip()}; please report it with the log")
