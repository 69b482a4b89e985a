"""Compiles kernels for every GPU architecture, without a GPU, and collects what each takes of one: registers, spills,
stack, shared memory. What is accepted stands in budget.toml (see budget.py).

They are read from what ptxas, NVIDIA's assembler, says (NVRTC's log with `--ptxas-options=-v`): three lines for each
kernel.

    ptxas info    : Compiling entry function 'relu_forward' for 'sm_90'
    ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 16 registers, used 0 barriers, 256 bytes smem

A device function that was not inlined has a stack line of its own, after the kernel that calls it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime.cache import cached
from segnet_scratch.runtime.compilation import Progress, no_progress, on_all_cores
from segnet_scratch.runtime.nvrtc import cache_path, compile_cubin
from segnet_scratch.runtime.occupancy import ARCHITECTURES
from segnet_scratch.runtime.signature import ElementTypes, parse_kernels
from segnet_scratch.runtime.source import Source, shipped_sources

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers.*")
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


@dataclass(frozen=True)
class Compilation:
    """One source compiled for one element type and architecture."""

    file: str  # "relu.cu"
    element: str
    architecture: str
    usages: tuple[Usage, ...]  # one for each kernel of the source, in its order
    remarks: tuple[str, ...]  # the compilers' warnings


def compile_all(
    sources: Sequence[Source] | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
    elements: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> list[Compilation]:
    """Every source (the shipped ones unless given) for every element type and architecture it is for, on all cores.

    What was compiled before is read from the cache. `progress` is told after each compilation how many are done of how
    many. Raises CompileError where a source does not compile, where there is no libnvrtc, or where it does not know an
    architecture.
    """
    jobs = [
        (source, element, architecture)
        for source in (shipped_sources() if sources is None else sources)
        for element in (source.elements if elements is None else elements)
        for architecture in architectures
        if source.compiles_for(architecture)
    ]

    def attempt(job: tuple[Source, str, str]) -> Compilation | None:
        try:
            return _compile(*job)
        except LogError:
            return None

    # NVRTC 13.0 was seen to leave a log empty while 16 threads compiled: then once more, with nobody beside it.
    found = on_all_cores(attempt, jobs, progress)
    return [_compile(*job) if one is None else one for one, job in zip(found, jobs, strict=True)]


def _compile(source: Source, element: str, architecture: str) -> Compilation:
    log = _cached_log(source, ElementTypes.named(element), architecture)
    usages = _usages(log, source, element, architecture)
    return Compilation(source.path.name, element, architecture, usages, tuple(remarks(log)))


def _usages(log: str, source: Source, element: str, architecture: str) -> tuple[Usage, ...]:
    """One for each kernel of the source; LogError where the log is not about them."""
    # By the GPU: what is compiled for sm_90a alone is what an sm_90 gets.
    found = {usage.kernel: replace(usage, architecture=architecture) for usage in parse_log(log, element)}
    names = [kernel.name for kernel in parse_kernels(source)]
    if sorted(found) != sorted(names):
        raise LogError(
            f"{source.path.name}, {architecture}: the log of ptxas names the kernels {', '.join(found) or 'none'}; "
            f"the source has {', '.join(names) or 'none'}"
        )
    return tuple(found[name] for name in names)


def _cached_log(source: Source, types: ElementTypes, architecture: str) -> str:
    """What the compilers said about a source, now or when it was compiled before; LogError where that is too little."""
    what = source, types, architecture

    def compiled() -> bytes:
        log: list[str] = []
        cubin = compile_cubin(*what, log)
        source.check_unchanged()
        cached(cache_path("cuda", ".cubin", *what), lambda: cubin)  # it has cost most of the time: not again
        _usages(log[0], source, types.name, architecture)  # what cannot be read is not kept
        return log[0].encode()

    return cached(cache_path("resources", ".log", *what), compiled).read_text(encoding="utf-8")


def parse_log(log: str, element: str) -> list[Usage]:
    """The kernels of a log, in its order. LogError where the log is not what this file expects."""
    head, *sections = re.split(r"^(?=.*Compiling entry function)", log, flags=re.MULTILINE)
    if stray := _FRAME.search(head) or _USED.search(head):
        raise _unreadable(stray[0])
    return [_usage(section, element) for section in sections]


def _usage(section: str, element: str) -> Usage:
    """What a log says of one kernel, and of the functions that it calls."""
    entry, used = _ENTRY.search(section), list(_USED.finditer(section))
    if entry is None or len(used) != 1:
        raise _unreadable(section.partition("\n")[0])
    frames = [tuple(map(int, frame)) for frame in _FRAME.findall(section)] or [(0, 0, 0)]
    stacks, stores, loads = zip(*frames, strict=True)

    def number(unit: str) -> int:
        found = re.search(rf"(\d+) {unit}", used[0][0])
        return int(found[1]) if found else 0

    return Usage(
        *(entry[1], element, entry[2]),
        registers=int(used[0][1]),
        spill_stores=sum(stores),
        spill_loads=sum(loads),
        # The cumulative size covers the functions that the kernel calls.
        stack=max(*stacks, number("bytes cumulative stack size")),
        shared=number("bytes smem"),
        barriers=number("barriers"),
    )


def _unreadable(line: str) -> LogError:
    return LogError(f"cannot read the log of ptxas at: {line.strip()}; please report it with the log")


def remarks(log: str) -> list[str]:
    """The lines with a compiler's warnings."""
    return [line.strip() for line in log.splitlines() if _REMARK.search(line)]
