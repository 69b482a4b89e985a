"""What compute-sanitizer watches: fixed cases of the op table for so many seconds, each row and kernel at least once.

Arrays come from cudaMalloc itself and are as large as they must be: in a pool, or between guard zones, an access beyond
an array would be no error to the tool. Outputs and workspace are not filled with anything, so that initcheck has
something to find.
"""

import json
import sys
from time import perf_counter

import cupy  # this script may: it is no part of the package

from gpu_check.op_table import problems_for_sanitizers, rows_for
from segnet_scratch import get_device
from segnet_scratch.runtime.launch import Kernel, shipped_kernels


def main(seconds: float) -> None:
    cupy.cuda.set_allocator(None)
    device = get_device("cuda")
    launched: set[str] = set()
    execute = device.execute

    def noted(kernel: Kernel, *rest: object) -> None:
        launched.add(kernel.name)
        execute(kernel, *rest)  # type: ignore[arg-type]

    device.execute = noted  # type: ignore[method-assign, assignment]
    runnable = {name for name, kernel in shipped_kernels().items() if kernel.source.compiles_for(device.architecture)}
    began, cases = perf_counter(), 0
    for _, op, inputs in problems_for_sanitizers(device):
        enough = cases >= len(rows_for(device)) and runnable <= launched
        if enough and perf_counter() - began > seconds:
            break
        op(device, **{name: None if a is None else device.upload(a) for name, a in inputs.items()})
        device.synchronise()
        cases += 1
    missing = sorted(runnable - launched)
    print(json.dumps({"cases": cases, "kernels": len(launched), "missing": missing}))


if __name__ == "__main__":
    main(float(sys.argv[1]))
