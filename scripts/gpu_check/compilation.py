"""Every source for both element types, before anything is timed: for this GPU, and for the host device beside it."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpu_check.part import Outcome, Work, judged
from segnet_scratch.errors import CompileError
from segnet_scratch.kernels import ElementTypes, host, nvrtc
from segnet_scratch.kernels.source import Source, shipped_sources


def compilation(work: Work) -> Outcome:
    """Compiles, or finds in the cache."""
    sources = [(s, ElementTypes.of(np.dtype(t))) for s in shipped_sources() for t in (np.float32, np.float64)]
    problems: list[str] = []

    def build(what: tuple[Source, ElementTypes]) -> None:
        try:
            host.build(*what)
        except CompileError as error:
            problems.append(str(error))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, sources))
    architecture = getattr(work.device, "architecture", None)
    for source, types in sources if architecture else ():
        try:
            nvrtc.cached_cubin(source, types, architecture)
        except CompileError as error:
            problems.append(str(error))
    return judged(f"{len(sources)} modules for the host device and {architecture or 'no GPU'}", problems)
