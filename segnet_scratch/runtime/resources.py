"""Compiles kernels for every GPU architecture, without a GPU, and collects what each takes of one: registers, spills,
stack, shared memory. What is accepted stands in budget.toml (see budget.py).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime.cache import cache_directory, cache_key, kept
from segnet_scratch.runtime.nvrtc import compile_cubin, compiler_options, cubin_path, nvrtc_version
from segnet_scratch.runtime.ptxas import Usage, parse_log, remarks
from segnet_scratch.runtime.signature import ElementTypes, parse_kernels
from segnet_scratch.runtime.source import Source, shipped_sources
from segnet_scratch.runtime.workers import worker_count

# Turing to Blackwell: T4 and RTX 20, A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


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
    progress: Callable[[int, int], None] = lambda done, total: None,
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
    # Threads will do: NVRTC compiles without holding Python's lock.
    pool = ThreadPoolExecutor(worker_count())
    try:
        results = []
        for result in pool.map(lambda job: _compile(*job), jobs):
            results.append(result)
            progress(len(results), len(jobs))
        return results
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the rest need not be compiled


def _compile(source: Source, element: str, architecture: str) -> Compilation:
    log = _cached_log(source, ElementTypes.named(element), architecture)
    # By the GPU: what is compiled for sm_90a alone is what an sm_90 gets.
    found = {usage.kernel: replace(usage, architecture=architecture) for usage in parse_log(log, element)}
    names = [kernel.name for kernel in parse_kernels(source)]
    if sorted(found) != sorted(names):
        raise CompileError(
            f"{source.path.name}, {architecture}: the log of ptxas names the kernels {', '.join(found) or 'none'}; "
            f"the source has {', '.join(names) or 'none'}"
        )
    usages = tuple(found[name] for name in names)
    return Compilation(source.path.name, element, architecture, usages, tuple(remarks(log)))


def _cached_log(source: Source, types: ElementTypes, architecture: str) -> str:
    """What the compilers said about a source, now or when it was compiled before."""
    key = cache_key(source.digest, compiler_options(types, architecture), nvrtc_version())
    path = cache_directory() / "resources" / f"{source.path.stem}-{types.name}-{architecture}-{key}.log"

    def compiled() -> bytes:
        log: list[str] = []
        cubin = compile_cubin(source, types, architecture, log)
        source.check_unchanged()
        kept(cubin_path(source, types, architecture), lambda: cubin)  # it has cost most of the time: not again
        return log[0].encode()

    return kept(path, compiled).read_text(encoding="utf-8")
