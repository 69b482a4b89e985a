"""Hopper's convolutions first of all, and in a process of their own: what is wrong with a barrier, a byte count or a
descriptor there hangs, and a kernel that hangs takes its process with it.

`python -m gpu_check.hopper DEVICE SECONDS` is that process: fixed cases of the rows, then random ones, a line for each.
"""

import os
import subprocess
import sys
from time import perf_counter

from gpu_check.part import Outcome, Work, judged
from segnet_scratch import get_device
from segnet_scratch.lab.proof.compare import check
from segnet_scratch.ops.convolution.conv2d_hopper import tiles_on
from segnet_scratch.ops.convolution.conv2d_hopper_cases import hopper_rows

START = 60  # seconds that the process may need beyond those of its cases
SHAPES, VALUES = 11, 12  # seeds


def hopper(work: Work) -> Outcome:
    """Against the float64 reference. What fails here is left out of the other parts (SEGNET_HOPPER=0)."""
    if work.on_gpu and tiles_on(work.device) is None:
        return Outcome(None, f"not run: the kernels are for sm_90, not for {work.device.architecture}")
    command = [sys.executable, "-m", "gpu_check.hopper", work.device.name, f"{work.seconds:.0f}"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=work.seconds + START)
        output, ended = child.stdout, f"exit code {child.returncode}"
        if child.returncode:
            output += child.stderr
    except subprocess.TimeoutExpired as error:
        output, ended = _text(error.stdout), f"no end after {work.seconds + START:.0f} s: what began last hangs"
    lines = output.splitlines()
    problems = [line for line in lines if not line.startswith("began ")]
    if ended != "exit code 0":
        problems = [f"{ended}; begun: {[line for line in lines if line.startswith('began ')][-1:]}", *problems]
    if problems:
        os.environ["SEGNET_HOPPER"] = "0"
    return judged(f"{sum(line.startswith('began ') for line in lines)} cases", problems)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main(name: str, seconds: float) -> None:
    device, began, turn = get_device(name), perf_counter(), 0
    rows = hopper_rows()
    longest = max(len(row.cases()) for row in rows)
    while turn < longest or perf_counter() - began < seconds:
        if device.gpu is None and perf_counter() - began > seconds:
            break  # on the host device the check itself is tried
        for row in rows:
            cases = row.cases()
            if turn < longest and turn >= len(cases):
                continue
            case = cases[turn] if turn < longest else row.random_case(row.generator(SHAPES, turn))
            print(f"began {row.name}: {case}", flush=True)
            for problem in check(row, case, device, row.generator(VALUES, turn)):
                print(problem, flush=True)
        turn += 1


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
