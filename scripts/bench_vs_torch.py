#!/usr/bin/env python
"""SegNet's training step and inference, ours beside PyTorch's: error, time and peak memory, measured in one run.

    scripts/bench_vs_torch.py --device cpu          our NumPy device; needs the extra `oracle`
    scripts/bench_vs_torch.py --device cuda         both engines beside PyTorch at its best
    scripts/bench_vs_torch.py --end-to-end numpy    `segnet train` beside the bare step, on numpy, host or cuda
    scripts/bench_vs_torch.py --host                the host device's tiled convolution beside a BLAS matrix product

Both sides get the same images, weights and number of threads. Nothing is timed before both are right. Times are taken
in turn, A B C A B C, so that whatever else the machine does meets all alike. On a CPU memory is that of a process of
its own.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import threadpoolctl
from bench.cases import CASES, COMPILED_AHEAD, Case, initial_state
from bench.run import compile_kernels, console, run, write

from segnet_scratch import __version__
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.runtime.workers import worker_count


def environment(threads: int) -> dict[str, Any]:
    """What a measurement depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    blas = [f"{i['internal_api']} {i['version']}" for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"]
    packages = [package for package in ("numpy", "torch") if package in sys.modules]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "threads": threads,
        "load": os.getloadavg(),
        "system": platform.platform(),
        "versions": {
            "segnet_scratch": __version__,
            "python": platform.python_version(),
            "blas": blas,
            **{package: version(package) for package in packages},
        },
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: the NumPy device (default)")
    parser.add_argument("--seconds", type=float, default=240, help="budget of time; the least important go (240)")
    parser.add_argument("--thorough", action="store_true", help="cuda: every way to run PyTorch, longer, no budget")
    parser.add_argument("--host", action="store_true", help="measure the host device's tiled convolution instead")
    parser.add_argument("--end-to-end", choices=("numpy", "host", "cuda"), help="measure the command segnet train")
    parser.add_argument("--data", type=Path, help="end to end: a data set in VOC layout (sample data)")
    parser.add_argument("--batch", type=int, default=4, help="cpu, end to end: images in a batch (4)")
    parser.add_argument("--size", type=int, default=224, help="cpu, end to end: height and width of the images (224)")
    parser.add_argument("--width", type=float, default=1.0, help="cpu, end to end: SegNet's width multiplier (1.0)")
    parser.add_argument("--threads", type=int, default=worker_count(), help="of each side (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to a file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def cpu_cases(options: argparse.Namespace) -> list[Case]:
    shape = options.batch, (options.size, options.size), "float32", options.width
    return [Case(task, *shape, on_gpu=False) for task in ("training", "inference")]


def memory_of(options: argparse.Namespace, case: Case, name: str) -> int:
    """Bytes that a contender's first steps take, in a process of its own."""
    shape = [f"--{what}={getattr(options, what)}" for what in ("batch", "size", "width", "threads")]
    command = [sys.executable, __file__, *shape, "--child", f"{case.task}: {name}"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def compile_peers() -> None:
    """PyTorch compiles its steps of the table's cases, each in a process of its own, all at once, and keeps them."""
    commands = ([sys.executable, __file__, "--child", f"compile: {number}"] for number in range(COMPILED_AHEAD))
    for process in [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]:
        process.wait()  # one that fails is told of where its step is to be timed


def be_a_child(options: argparse.Namespace) -> None:
    """What is done in a process of its own: compiling, or measuring memory."""
    from bench.contenders import OURS, Peer, makers_of

    task, name = options.child.split(": ")
    if task == "compile":
        case = CASES[int(name)]
        Peer(case, initial_state(0, case.width), way="compile graph", folded=case.task == "inference")
        return
    case = next(case for case in cpu_cases(options) if case.task == task)
    print(makers_of(case, get_device("numpy"), list(OURS), False)[name]()[1])


def main() -> None:
    options = parse_arguments()
    os.environ["SEGNET_THREADS"] = str(options.threads)
    threadpoolctl.threadpool_limits(options.threads)
    if not (options.host or options.end_to_end):
        try:
            import torch
        except ModuleNotFoundError:
            raise SystemExit("error: PyTorch is not installed; pip install -e '.[oracle]', or --host") from None
        torch.set_num_threads(options.threads)
    if options.child:
        be_a_child(options)
        return
    began = perf_counter()
    found: dict[str, Any] = {"environment": environment(1 if options.host else options.threads)}

    def keep(**parts: Any) -> None:
        found.update(parts, seconds=perf_counter() - began)
        if options.json is not None:
            write(options.json, found)

    if options.host:
        from bench import host

        keep(host=host.measure(options.seconds / 10))
    elif options.end_to_end:
        from bench import end_to_end

        shape = options.batch, options.size, options.width
        keep(end_to_end=end_to_end.measure(options.end_to_end, *shape, options.seconds / 20, options.data))
    elif options.device == "cuda":
        device = get_device("cuda")
        found["environment"] |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        console.print(", ".join(f"{what} {found['environment'][what]}" for what in ("device", "versions", "cudnn")))
        compile_peers()
        compile_kernels(device)
        run(device, CASES, options.seconds, options.thorough, keep)
    else:
        run(
            *(get_device("numpy"), cpu_cases(options), options.seconds, options.thorough, keep),
            memory_of=lambda case, name: memory_of(options, case, name),
        )


if __name__ == "__main__":
    main()
