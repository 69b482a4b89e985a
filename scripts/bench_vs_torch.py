#!/usr/bin/env python
"""SegNet's training step and inference, ours beside PyTorch's: error, time and peak memory, measured in one run.

    scripts/bench_vs_torch.py --device cpu          our NumPy device; needs the extra `oracle`
    scripts/bench_vs_torch.py --device cuda         both engines beside PyTorch at its best (bench_gpu/)
    scripts/bench_vs_torch.py --host                the host device's tiled convolution beside a BLAS matrix product

Both sides get the same images, weights and number of threads. Nothing is timed before both are right. Times are taken
in turn, A B C A B C, so that whatever else the machine does meets all alike. Memory is that of a process of its own.
"""

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import threadpoolctl
from bench_gpu.common import (
    CLASSES,
    DECAY,
    ERROR_FACTOR,
    ERROR_FLOOR,
    LR,
    MOMENTUM,
    VOID,
    Arrays,
    data,
    lifted,
    relative_errors,
)
from rich.console import Console
from rich.table import Table

MEMORY_STEPS = 3
STEP_TARGET, MEMORY_TARGET, HOST_TARGET = 2.5, 1.5, 40

console = Console()


@dataclass(frozen=True)
class Work:
    """What every contender computes."""

    batch: int
    size: int
    width: float
    seed: int = 0

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, h, w, 3) and labels (n, h, w)."""
        return data(self.batch, (self.size, self.size), self.seed)


class Contender(Protocol):
    """One implementation, with its model, optimiser and data at hand. Every call returns when the work is done."""

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes weights under the names of our checkpoints."""

    def train_step(self) -> None:
        """Forward, loss, backward, update."""

    def infer(self) -> None:
        """Logits in evaluation mode."""

    def training_pass(self) -> Arrays:
        """Logits (n, h, w, classes) and the gradient of every parameter (OIHW), by name."""


class Ours:
    """This project on one of its devices."""

    def __init__(self, work: Work, device: str) -> None:
        from segnet_scratch.segnet import SegNet
        from segnet_scratch.step import TrainingStep

        self.images, self.labels = work.data()
        self.model = SegNet(CLASSES, work.width, device)
        self._step = TrainingStep(self.model, momentum=MOMENTUM, decay=DECAY)

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self.model.load_state_dict(state)
        self._step.optimiser.refresh()

    def train_step(self) -> None:
        self._step(self.images, self.labels, LR)
        self.model.device.synchronise()

    def infer(self) -> None:
        from segnet_scratch.nn.autograd import no_grad

        with no_grad():
            self.model.eval()(self.images)
        self.model.device.synchronise()

    def training_pass(self) -> Arrays:
        from segnet_scratch.segnet import to_file_layout

        logits = self._step.gradients(self.images, self.labels)
        download = self.model.device.download
        gradients = {name: to_file_layout(download(p.grad)) for name, p in self.model.named_parameters().items()}
        return {"logits": download(logits), **gradients}


class PyTorch:
    """The peer, in one memory format."""

    def __init__(self, work: Work, memory_format: str, dtype: str = "float32") -> None:
        import torch
        from torch_segnet import TorchSegNet, parameter_groups

        self.form = {"dtype": getattr(torch, dtype), "memory_format": getattr(torch, memory_format)}
        images, labels = work.data()
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(**self.form)
        self.labels = torch.from_numpy(labels).long()
        self.model = TorchSegNet(CLASSES, work.width).to(**self.form)
        self.optimiser = torch.optim.SGD(parameter_groups(self.model, DECAY), lr=LR, momentum=MOMENTUM, fused=True)

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self.model.load_numpy(state)

    def _forward_backward(self) -> Any:
        from torch.nn.functional import cross_entropy

        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        logits = self.model(self.images)
        cross_entropy(logits, self.labels, ignore_index=VOID).backward()
        return logits

    def train_step(self) -> None:
        self._forward_backward()
        self.optimiser.step()

    def infer(self) -> None:
        import torch

        with torch.inference_mode():
            self.model.eval()(self.images)

    def training_pass(self) -> Arrays:
        logits = self._forward_backward().detach().numpy().transpose(0, 2, 3, 1)
        return {"logits": logits, **{name: p.grad.numpy() for name, p in self.model.named_parameters()}}


# Of the CPU; the first is ours.
CONTENDERS: dict[str, Callable[[Work], Contender]] = {
    "ours, numpy": lambda work: Ours(work, "numpy"),
    "PyTorch, channels_last": lambda work: PyTorch(work, "channels_last"),
    "PyTorch, contiguous": lambda work: PyTorch(work, "contiguous_format"),
}


# --- error -------------------------------------------------------------------------------------------------------


def correctness(factories: Mapping[str, Callable[[Work], Contender]], width: float) -> dict[str, dict[str, float]]:
    """Errors against float64, by contender.

    The best of three draws: where an input of ReLU lies within a rounding of 0, or two values of a pool window within
    one of each other, a rounding decides what follows. That adds to an error now and then, a mistake always. Lifting
    batch norms by two deviations makes it rare.
    """
    errors: dict[str, list[dict[str, float]]] = {name: [] for name in factories}
    for seed in range(3):
        work = Work(2, 32, width, seed)
        state = lifted(initial_state(work))
        truth = training_pass(lambda work: PyTorch(work, "contiguous_format", "float64"), work, state)
        for name, factory in factories.items():
            errors[name].append(relative_errors(training_pass(factory, work, state), truth))
    return {name: {what: min(e[what] for e in draws) for what in draws[0]} for name, draws in errors.items()}


def initial_state(work: Work) -> Arrays:
    from segnet_scratch.segnet import SegNet

    return SegNet(CLASSES, work.width, "numpy", seed=work.seed).state_dict()


def training_pass(factory: Callable[[Work], Contender], work: Work, state: Arrays) -> Arrays:
    contender = factory(work)
    contender.load(state)
    return contender.training_pass()


def report_errors(errors: Mapping[str, Mapping[str, float]]) -> bool:
    """Prints the errors; whether ours are those of a right implementation."""
    table = Table(title="float32 error against PyTorch in float64 (relative; gradients: the worst parameter)")
    for column in ("", "logits", "gradients"):
        table.add_column(column, justify="left" if not column else "right")
    for name, e in errors.items():
        table.add_row(name, f"{e['logits']:.1e}", f"{e['gradients']:.1e}")
    console.print(table)
    ours, *others = errors.values()
    return all(ours[what] <= ERROR_FACTOR * max(e[what] for e in others) + ERROR_FLOOR for what in ours)


# --- time --------------------------------------------------------------------------------------------------------


def interleaved(calls: Mapping[str, Callable[[], Any]], repetitions: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every repetition of every call, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with console.status("measuring") as status:
        for repetition in range(-warm_up, repetitions):
            status.update(f"warming up ({-repetition})" if repetition < 0 else f"{repetition + 1} of {repetitions}")
            for name, call in calls.items():
                gc.collect()  # what one contender leaves behind is not charged to the next
                start = perf_counter()
                call()
                if repetition >= 0:
                    seconds[name].append(perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    low, median, high = (float(q) for q in np.percentile(seconds, (25, 50, 75)))
    # On a machine that does other things too, the fastest is the closest to what a calm one would show.
    return {"median": median, "quartiles": [low, high], "fastest": min(seconds), "seconds": seconds}


def report_times(what: str, times: Mapping[str, Mapping[str, Any]], batch: int) -> dict[str, float]:
    """Prints a table; ours over each of the others, by name."""
    table = Table(title=f"{what}\n(seconds; ratio: ours to this, of medians)")
    for column in ("", "median", "quartiles", "fastest", "images/s", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    ours, *others = times
    ratios = {name: times[ours]["median"] / times[name]["median"] for name in others}
    for name, t in times.items():
        quartiles = " - ".join(f"{q:.3g}" for q in t["quartiles"])
        ratio = f"{ratios[name]:.2f}" if name in ratios else ""
        seconds = f"{t['median']:.3g}", quartiles, f"{t['fastest']:.3g}"
        table.add_row(name, *seconds, f"{batch / t['median']:.3g}", ratio)
    console.print(table)
    return ratios


# --- memory ------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes that this process has held at most.

    ru_maxrss would do, but on Linux a process inherits it from whoever started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def run_child(factory: Callable[[Work], Contender], name: str, work: Work) -> None:
    """In a process of its own: prints the peak memory of a few training steps, beyond that of importing."""
    import_module("segnet_scratch.optim" if is_ours(name) else "torch_segnet")
    imported = peak_memory()
    contender = factory(work)
    for _ in range(MEMORY_STEPS):
        contender.train_step()
    print(json.dumps({"imports": imported, "training": peak_memory() - imported}))


def measure_memory(names: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Bytes by contender."""
    options = ("device", "batch", "size", "width", "threads")
    command = [sys.executable, __file__, *(f"--{option}={getattr(arguments, option)}" for option in options)]
    results = {}
    for name in names:
        with console.status(f"memory of {name}"):
            child = subprocess.run([*command, "--child", name], stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(child.stdout)
    return results


def report_memory(memory: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Prints a table; ours over each of the others, by name."""
    table = Table(title=f"peak memory of {MEMORY_STEPS} training steps, beyond imports")
    for column in ("", "MiB", "imports, MiB", "ours / this"):
        table.add_column(column, justify="left" if not column else "right")
    ours, *others = memory
    ratios = {name: memory[ours]["training"] / memory[name]["training"] for name in others}
    for name, m in memory.items():
        ratio = f"{ratios[name]:.2f}" if name in ratios else ""
        table.add_row(name, f"{m['training'] / 2**20:.0f}", f"{m['imports'] / 2**20:.0f}", ratio)
    console.print(table)
    return ratios


# --- the two modes -----------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Error, time and memory of a device's contenders; what the JSON file holds."""
    work = Work(arguments.batch, arguments.size, arguments.width)
    factories = CONTENDERS
    errors = correctness(factories, arguments.width)
    if not report_errors(errors):
        raise SystemExit("error: our results are wrong, so their speed says nothing")

    state = initial_state(work)
    contenders = {name: factory(work) for name, factory in factories.items()}
    for contender in contenders.values():
        contender.load(state)
    report: dict[str, Any] = {"work": asdict(work), "errors": errors}
    phases = (("training step", "train_step"), ("inference", "infer"))
    for what, method in phases:
        calls = {name: getattr(contender, method) for name, contender in contenders.items()}
        times = {name: summary(s) for name, s in interleaved(calls, arguments.repetitions).items()}
        title = f"{what}, batch {work.batch}, {work.size}x{work.size}, width {work.width}, {arguments.threads} threads"
        ratios = report_times(title, times, work.batch)
        report[what] = {"times": times, "ratios": ratios}
    memory = measure_memory(list(factories), arguments)
    report["memory"] = {"bytes": memory, "ratios": report_memory(memory)}
    peer = list(factories)[1]
    verdict(f"training step, ours / {peer}", report["training step"]["ratios"][peer], STEP_TARGET)
    verdict(f"peak memory, ours / {peer}", report["memory"]["ratios"][peer], MEMORY_TARGET)
    return report


def measure_host(arguments: argparse.Namespace) -> dict[str, Any]:
    """The host device's tiled convolution on one core beside a matrix product of one BLAS thread."""
    from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
    from segnet_scratch.ops.op import spec
    from segnet_scratch.runtime.devices import HostDevice
    from segnet_scratch.runtime.host import HostOptions

    device = HostDevice(HostOptions(workers=1))
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 1024, 1024), np.float32)
    blas = "BLAS, 1024x1024x1024"
    calls: dict[str, Callable[[], Any]] = {blas: lambda: left @ right}
    flops = {blas: 2 * 1024**3}
    for channels in (64, 128):
        x, weight = spec((1, 56, 56, channels), np.float32), spec((channels, 3, 3, channels), np.float32)
        for plan in (Conv2dForward, Conv2dBackwardData, Conv2dBackwardWeight):
            op = plan.plan(x, weight, 1, 1, "tiled")
            arrays = {name: rng.standard_normal(s.shape, np.float32) for name, s in op.inputs.items()}
            name = f"{op.name}, {channels} -> {channels}, 3x3, 56x56"
            calls[name] = lambda op=op, arrays=arrays: op(device, **arrays)
            flops[name] = op.flops
    with threadpoolctl.threadpool_limits(1):
        times = {name: summary(s) for name, s in interleaved(calls, arguments.repetitions).items()}

    speeds = {name: flops[name] / t["median"] / 1e9 for name, t in times.items()}
    slower = {name: speeds[blas] / speed for name, speed in speeds.items() if name != blas}
    table = Table(title="one core, float32")
    for column in ("", "GFLOP/s", "of BLAS"):
        table.add_column(column, justify="left" if not column else "right")
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:.2f}", f"1/{slower[name]:.1f}" if name in slower else "")
    console.print(table)
    verdict("BLAS / the slowest tiled convolution", max(slower.values()), HOST_TARGET)
    return {"times": times, "gflops": speeds, "blas_over_this": slower}


def verdict(what: str, value: float, target: float) -> None:
    """Prints a measured value beside the most that is wanted."""
    console.print(f"{what}: {value:.2f}, target at most {target:g}: {'met' if value <= target else 'MISSED'}")


def environment(threads: int) -> dict[str, Any]:
    """What a measurement depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    blas = [f"{i['internal_api']} {i['version']}" for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"]
    packages = ("segnet_scratch", "numpy", *(["torch"] if "torch" in sys.modules else []))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        ),
        "threads": threads,
        "load": os.getloadavg(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "blas": blas, **{p: version(p) for p in packages}},
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: the NumPy device (default)")
    parser.add_argument("--seconds", type=float, default=240, help="cuda: budget of time; the least important go (240)")
    parser.add_argument("--thorough", action="store_true", help="cuda: every way to run PyTorch, longer, no budget")
    parser.add_argument("--host", action="store_true", help="measure the host device's tiled convolution instead")
    parser.add_argument("--batch", type=int, default=4, help="images in a batch (4)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (224)")
    parser.add_argument("--width", type=float, default=1.0, help="SegNet's width multiplier (1.0)")
    parser.add_argument("--repetitions", type=int, default=10, help="of every measurement, after a warm-up (10)")
    parser.add_argument("--threads", type=int, default=cores, help="of each side (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to a file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def set_threads(threads: int, with_torch: bool) -> None:
    """The same number for both sides."""
    os.environ["SEGNET_THREADS"] = str(threads)
    threadpoolctl.threadpool_limits(threads)
    if with_torch:
        try:
            import torch
        except ModuleNotFoundError:
            raise SystemExit("error: PyTorch is not installed; pip install -e '.[oracle]', or --host") from None
        torch.set_num_threads(threads)


def main() -> None:
    arguments = parse_arguments()
    child = arguments.child
    set_threads(arguments.threads, with_torch=not arguments.host and not (child and is_ours(child)))
    if child:
        work = Work(arguments.batch, arguments.size, arguments.width)
        run_child(CONTENDERS[child], child, work)
        return
    if arguments.device == "cuda" and not arguments.host:
        from bench_gpu import run

        run.main(arguments.seconds, arguments.thorough, arguments.json, environment(arguments.threads))
        return
    report = measure_host(arguments) if arguments.host else compare(arguments)
    if arguments.json:
        report = {"environment": environment(1 if arguments.host else arguments.threads), **report}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
