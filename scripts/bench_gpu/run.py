"""The whole benchmark in a budget of time: gate, ceilings, cases, layers; a table and JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench_gpu.cases import CASES, Case
from bench_gpu.timing import Clock, Times, in_turn, latencies
from segnet_scratch.files import write_durably
from segnet_scratch.runtime.compilation import compile_for
from segnet_scratch.runtime.launch import ElementTypes, shipped_kernels

console = Console()
CASE_SECONDS, THOROUGH_SECONDS = 2.5, 12.0  # of timing, for a case; setting up comes on top
INPUTS = 4  # batches that take turns


@dataclass
class Result:
    """What came of a case."""

    case: Case
    times: dict[str, Times]
    latency: dict[str, Times] = field(default_factory=dict)  # of one image, each call waited for
    memory: dict[str, int] = field(default_factory=dict)  # bytes
    unavailable: dict[str, str] = field(default_factory=dict)  # contenders and why not

    @property
    def best_peer(self) -> str:
        """PyTorch's fastest."""
        return min((n for n in self.times if n.startswith("PyTorch")), key=lambda name: self.times[name].median)

    @property
    def best_ours(self) -> str:
        """Our fastest."""
        return min((n for n in self.times if n.startswith("ours")), key=lambda name: self.times[name].median)

    @property
    def speedup(self) -> float:
        """PyTorch's best time over ours."""
        return self.times[self.best_peer].median / self.times[self.best_ours].median

    def to_json(self) -> dict[str, Any]:
        """Everything measured."""

        def numbers(times: Mapping[str, Times]) -> dict[str, Any]:
            return {n: {"median": t.median, "quartiles": t.quartiles, "seconds": t.seconds} for n, t in times.items()}

        return {
            "case": str(self.case),
            "times": numbers(self.times),
            "latency": numbers(self.latency),
            "memory": self.memory,
            "unavailable": self.unavailable,
            "speedup": self.speedup,
            "target": self.case.target,
        }


Maker = Callable[[], tuple[Callable[[int], object], int]]  # (call with the number of a batch, bytes held)


def run_case(case: Case, makers: Mapping[str, Maker], clock: Clock, seconds: float) -> Result:
    """Builds every contender that can be built, then takes their times in turn."""
    result, calls = Result(case, {}), {}
    for name, make in makers.items():
        try:
            call, result.memory[name] = make()  # whatever is compiled or searched for happens here
            calls[name] = _rotating(call)
        except Exception as error:  # a contender that cannot run is reported, the others still run
            result.unavailable[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    for side in ("ours", "PyTorch"):
        if not any(name.startswith(side) for name in calls):
            reasons = "; ".join(f"{name}: {why}" for name, why in result.unavailable.items())
            raise RuntimeError(f"{case}: no contender of {side} runs: {reasons}")
    result.times = in_turn(calls, clock, seconds)
    if case.batch == 1:
        result.latency = latencies(calls, clock)
    return result


def _rotating(call: Callable[[int], object]) -> Callable[[], None]:
    """Each call takes the next of the batches, so that none stays in a cache."""
    count = 0

    def rotate() -> None:
        nonlocal count
        call(count % INPUTS)
        count += 1

    return rotate


def report(results: Sequence[Result], device: str) -> Table:
    """Ours beside PyTorch's best, a line a case."""
    table = Table(title=f"milliseconds a batch on {device}: median (quartiles)")
    for column in ("case", "ours", "", "PyTorch's best", "", "speed-up", "target", "memory, ours / PyTorch"):
        table.add_column(column)
    for result in results:
        cells = []
        for name in (result.best_ours, result.best_peer):
            times = result.times[name]
            low, high = times.quartiles
            cells += [f"{1e3 * times.median:.2f} ({1e3 * low:.2f} - {1e3 * high:.2f})", name.split(", ", 1)[1]]
        ours, peer = result.memory[result.best_ours], result.memory[result.best_peer]
        met = "met" if result.speedup >= result.case.target else "MISSED"
        share = f"{ours / peer:.2f}" if peer else "-"
        table.add_row(str(result.case), *cells, f"{result.speedup:.2f}", f"{result.case.target} {met}", share)
    return table


def main(seconds: float, thorough: bool, path: Path | None, environment: Mapping[str, Any]) -> None:
    """Runs on the GPU at hand, the most important cases first; leaves out what the budget of seconds has no room for.

    The JSON file is written after each case. `thorough`: every case and every way to run PyTorch, more time for each.
    """
    import torch

    from bench_gpu import gate, layers
    from bench_gpu.contenders import makers_of
    from bench_gpu.timing import CudaClock
    from segnet_scratch import get_device

    began, device, clock = perf_counter(), get_device("cuda"), CudaClock()
    name = torch.cuda.get_device_name()
    console.print(f"{name}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    found: dict[str, Any] = {"environment": {**environment, "device": name, "cudnn": torch.backends.cudnn.version()}}

    def keep(**parts: Any) -> None:
        found.update(parts, seconds=perf_counter() - began)
        if path is not None:
            write(path, found)

    with console.status("compiling kernels") as status:
        kernels = [
            (kernel, ElementTypes.named(element))
            for kernel in shipped_kernels().values()
            if kernel.source.compiles_for(device.architecture)
            for element in kernel.source.elements
            if element != "float64"
        ]
        compile_for(device, kernels, lambda done, total: status.update(f"compiling kernels, {done} of {total}"))
    errors = gate.errors_of(device)
    verdicts = {precision: gate.right(measured) for precision, measured in errors.items()}
    for precision, measured in errors.items():
        for contender, e in measured.items():
            mark = "" if verdicts[precision].get(contender, True) else "  WRONG: not timed"
            console.print(f"{precision}: {contender}: logits {e['logits']:.1e}, gradients {e['gradients']:.1e}{mark}")
    limits = layers.ceilings(clock, 4.0 if thorough else 1.0)
    console.print(", ".join(f"{what} {value:.1f}" for what, value in limits.items()))
    results: list[Result] = []
    left_out: list[Case] = list(CASES)
    keep(errors=errors, ceilings=limits)
    longest = 0.0
    while left_out and (thorough or perf_counter() - began + longest < seconds):
        case, start = left_out.pop(0), perf_counter()
        right = [contender for contender, fine in verdicts[case.precision].items() if fine]
        makers = makers_of(case, device, right, thorough)
        try:
            results.append(run_case(case, makers, clock, THOROUGH_SECONDS if thorough else CASE_SECONDS))
        except RuntimeError as error:
            console.print(f"error: {error}")
            continue
        longest = max(longest, perf_counter() - start)
        console.print(f"{case}: {results[-1].speedup:.2f} x ({results[-1].best_ours} / {results[-1].best_peer})")
        keep(cases=[result.to_json() for result in results], left_out=[str(other) for other in left_out])
    if thorough:
        keep(layers=list(layers.convolutions(CASES[0], device, clock, 0.1 * seconds)))
    console.print(report(results, name))
    if left_out:
        console.print("left out, for want of time: " + "; ".join(map(str, left_out)))


def write(path: Path, found: Mapping[str, Any]) -> None:
    """The JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, [json.dumps(found, indent=1, default=_number).encode() + b"\n"])


def _number(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else str(value)
