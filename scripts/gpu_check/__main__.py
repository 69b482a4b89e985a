"""Checks the cuda device on the machine at hand and writes a report: JSON and a table.

Every part has a share of the time and adds no more cases when it is used up; the report says how many ran. Each part
runs even where another failed; the exit code is 1 if any failed. `--device host` tries the check itself on a machine
without a GPU, with smaller counts.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from gpu_check import report
from gpu_check.compilation import compilation
from gpu_check.demo import demo
from gpu_check.fused import fused_engine
from gpu_check.gradients import gradients
from gpu_check.hopper import hopper
from gpu_check.op_table import bits_of_the_host, determinism, exact, kernels
from gpu_check.part import Outcome, Work
from gpu_check.sanitizers import sanitizers
from gpu_check.streams import graphs, uploads
from gpu_check.timing import timing
from gpu_check.training import learning, losses_of_other_devices, same_run_again
from segnet_scratch import get_device
from segnet_scratch.errors import SegnetError

# The parts in the order in which they run, what is learnt soonest first, with their shares of the time.
PARTS: dict[str, tuple[Callable[[Work], Outcome], float]] = {
    "compilation": (compilation, 0.08),
    "hopper": (hopper, 0.05),
    "kernels": (kernels, 0.14),
    "integers": (exact, 0.06),
    "losses": (losses_of_other_devices, 0.04),
    "fused engine": (fused_engine, 0.04),
    "learning": (learning, 0.08),
    "graphs": (graphs, 0.03),
    "uploads": (uploads, 0.04),
    "timing": (timing, 0.06),
    "determinism": (determinism, 0.06),
    "same run again": (same_run_again, 0.05),
    "gradients": (gradients, 0.08),
    "sanitizers": (sanitizers, 0.08),  # and as much again until the tools have started
    "bits of the host": (bits_of_the_host, 0.05),
    "demo": (demo, 0.05),
}


def run_part(name: str, work: Work) -> Outcome:
    """The part's outcome; whatever it raises is one, as the other parts are still worth their time on the GPU."""
    try:
        return PARTS[name][0](work)
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        return Outcome(False, lines[-1], lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "host"))
    parser.add_argument("--out", type=Path, default=report.ROOT / "benchmarks", help="folder of the report")
    parser.add_argument("--seconds", type=float, default=420, help="to be shared by all parts (default: 420)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    options = parser.parse_args()
    try:
        device = get_device(options.device)
    except SegnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts, results = report.environment(device), {}
    for name in options.only or PARTS:
        began = perf_counter()
        outcome = run_part(name, Work(device, PARTS[name][1] * options.seconds))
        results[name] = outcome, perf_counter() - began
        print(f"{name}: {report.MARKS[outcome.passed]}: {outcome.summary} ({results[name][1]:.0f} s)")
        for line in outcome.problems[:5]:
            print(f"    {line}")
        path = report.write(options.out, facts, results)  # after each part: a machine may be taken away
    print(f"report: {path}")
    print(report.closing_line(facts, results))
    return 1 if any(outcome.passed is False for outcome, _ in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
