"""What the launched kernels take of a GPU: registers, spills, shared memory, occupancy. Compiled, not run."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime.multiprocessor import ARCHITECTURES, Occupancy, occupancy
from segnet_scratch.runtime.nvrtc import supported_architectures
from segnet_scratch.runtime.observe import Launch
from segnet_scratch.runtime.resources import LogError, Usage, compile_all


@dataclass(frozen=True)
class KernelFigures:
    """A kernel in one block size on one architecture."""

    usage: Usage
    threads: int  # of a block
    dynamic_shared: int  # bytes
    launches: int
    occupancy: Occupancy

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        usage = self.usage
        return {
            "kernel": usage.kernel,
            "architecture": usage.architecture,
            "element": usage.element,
            "threads": self.threads,
            "launches": self.launches,
            "registers": usage.registers,
            "spill_bytes": usage.spill_stores + usage.spill_loads,
            "stack_bytes": usage.stack,
            "shared_bytes": usage.shared + self.dynamic_shared,
            "occupancy": self.occupancy.share,
            "blocks_per_multiprocessor": self.occupancy.blocks,
            "limited_by": self.occupancy.limit,
        }


def kernel_figures(
    launches: Iterable[Launch],
    architectures: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[KernelFigures], str]:
    """(figures, message): of each kernel and block size that was launched, on each architecture.

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
            figures.append(KernelFigures(usage, threads, shared, number, held))
    return figures, message
