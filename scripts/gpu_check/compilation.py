"""Every source for its element types, before anything is timed: for this GPU, and for the host device beside it."""

import os
from concurrent.futures import ThreadPoolExecutor

from gpu_check.part import Outcome, Work, judged
from segnet_scratch.errors import CompileError
from segnet_scratch.runtime import host, nvrtc
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.source import Source, shipped_sources


def compilation(work: Work) -> Outcome:
    """Compiles, or finds in the cache."""
    sources = [(s, ElementTypes.named(element)) for s in shipped_sources() for element in s.elements]
    problems: list[str] = []

    def build(what: tuple[Source, ElementTypes]) -> None:
        try:
            host.build(*what)
        except CompileError as error:
            problems.append(str(error))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, sources))
    architecture = work.device.architecture
    for source, types in sources:
        if architecture is None or not source.compiles_for(architecture):
            continue
        try:
            nvrtc.cached_cubin(source, types, architecture)
        except CompileError as error:
            problems.append(str(error))
    return judged(f"{len(sources)} modules for the host device and {architecture or 'no GPU'}", problems)
