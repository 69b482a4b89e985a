"""Compiles kernels for every GPU architecture, without a GPU, and collects what each takes of one: registers, spills,
stack, shared memory. What is accepted stands in budget.toml (see budget.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from segnet_scratch.runtime.cache import kept
from segnet_scratch.runtime.compilation import Progress, no_progress, on_all_cores
from segnet_scratch.runtime.multiprocessor import ARCHITECTURES
from segnet_scratch.runtime.nvrtc import cache_path, compile_cubin
from segnet_scratch.runtime.ptxas import LogError, Usage, parse_log, remarks
from segnet_scratch.runtime.signature import ElementTypes, parse_kernels
from segnet_scratch.runtime.source import Source, shipped_sources


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
        kept(cache_path("cuda", ".cubin", *what), lambda: cubin)  # it has cost most of the time: not again
        _usages(log[0], source, types.name, architecture)  # what cannot be read is not kept
        return log[0].encode()

    return kept(cache_path("resources", ".log", *what), compiled).read_text(encoding="utf-8")
