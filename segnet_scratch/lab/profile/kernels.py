"""What the launched kernels take of a GPU: registers, spills, shared memory, occupancy. Compiled, not run."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime.nvrtc import supported_architectures
from segnet_scratch.runtime.observe import Launch
from segnet_scratch.runtime.occupancy import ARCHITECTURES, occupancy
from segnet_scratch.runtime.resources import LogError, compile_all


def kernel_figures(
    launches: Iterable[Launch],
    architectures: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[dict[str, Any]], str]:
    """(figures, message): by name, of each kernel and block size that was launched, on each architecture.

    The message says what is left out and how to get it: NVRTC, or an architecture that it does not know. CompileError
    for a kernel that does not compile.
    """
    counts = Counter((x.kernel, x.types, prod(x.block), x.shared) for x in launches)
    if not counts:
        return [], ""
    try:
        known = supported_architectures()
    except CompileError as error:
        return [], f"no registers and no occupancy: {error}"
    wanted = [a for a in architectures if a in known and a in ARCHITECTURES]
    left_out = [a for a in architectures if a not in wanted]
    message = f"no registers and no occupancy for {', '.join(left_out)}: not known here" if left_out else ""
    sources = list({kernel.source.path: kernel.source for kernel, *_ in counts}.values())
    try:
        compilations = compile_all(sources, wanted, progress=progress)
    except LogError as error:  # what was measured is worth more than figures beside it
        return [], f"no registers and no occupancy: {error}"
    usages = {(u.kernel, u.element, u.architecture): u for c in compilations for u in c.usages}
    figures = []
    for (kernel, types, threads, shared), number in sorted(counts.items(), key=lambda item: item[0][0].name):
        for architecture in wanted:
            usage = usages[kernel.name, types.name, architecture]
            held = occupancy(architecture, threads, usage.registers, usage.shared + shared)
            figures.append(
                {
                    "kernel": kernel.name,
                    "architecture": architecture,
                    "element": types.name,
                    "threads": threads,
                    "launches": number,
                    "registers": usage.registers,
                    "stack_bytes": usage.stack,
                    "spill_bytes": usage.spill_stores + usage.spill_loads,
                    "shared_bytes": usage.shared + shared,
                    "occupancy": held.share,
                    "blocks_per_multiprocessor": held.blocks,
                    "limited_by": held.limit,
                }
            )
    return figures, message
