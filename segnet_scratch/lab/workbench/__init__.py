"""One kernel by itself: run with random inputs, checked against NumPy, for races and for memory errors.

For people who write kernels. `setup` finds out what to launch, `guards` puts the arrays between guard zones,
`execution` runs, `checks`, `reference`, `races` and `sanitizers` look at what happened, `run` puts it together.
"""

from segnet_scratch.lab.workbench.checks import Check
from segnet_scratch.lab.workbench.run import KernelRun, run_kernel

__all__ = ["Check", "KernelRun", "run_kernel"]
