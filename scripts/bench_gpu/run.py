"""The whole benchmark in a budget of time: gate, ceilings, cases, layers; a table and JSON."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench_gpu.cases import CASES, Case
from bench_gpu.timing import Clock, Times, in_turn, latencies

console = Console()
CASE_SECONDS = 12.0  # of timing, for a case; setting up comes on top
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


def main(arguments: argparse.Namespace, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Runs on the GPU at hand."""
    import torch

    from bench_gpu import gate, layers
    from bench_gpu.contenders import makers_of
    from bench_gpu.timing import CudaClock
    from segnet_scratch import get_device

    began, device, clock = perf_counter(), get_device("cuda"), CudaClock()
    name = torch.cuda.get_device_name()
    console.print(f"{name}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    errors = gate.errors_of(device)
    verdicts = {precision: gate.right(found) for precision, found in errors.items()}
    for precision, found in errors.items():
        for contender, e in found.items():
            mark = "" if verdicts[precision].get(contender, True) else "  WRONG: not timed"
            console.print(f"{precision}: {contender}: logits {e['logits']:.1e}, gradients {e['gradients']:.1e}{mark}")
    limits = layers.ceilings(clock, 4.0)
    console.print(", ".join(f"{what} {value:.1f}" for what, value in limits.items()))
    results: list[Result] = []
    left_out: list[Case] = []
    remaining = list(CASES)
    while remaining:
        spent = perf_counter() - began
        if results and spent + (spent / len(results)) > 0.85 * arguments.seconds:
            left_out = remaining
            break
        case = remaining.pop(0)
        right = [contender for contender, fine in verdicts[case.precision].items() if fine]
        makers = makers_of(case, device, right, arguments.thorough)
        try:
            results.append(run_case(case, makers, clock, CASE_SECONDS))
        except RuntimeError as error:
            console.print(f"error: {error}")
            continue
        console.print(f"{case}: {results[-1].speedup:.2f} x ({results[-1].best_ours} / {results[-1].best_peer})")
    by_layer = layers.convolutions(CASES[0], device, clock, 0.1 * arguments.seconds)
    console.print(report(results, name))
    if left_out:
        console.print("left out, for want of time: " + "; ".join(map(str, left_out)))
    return {
        "environment": {**environment, "device": name, "cudnn": torch.backends.cudnn.version()},
        "errors": errors,
        "ceilings": limits,
        "cases": [result.to_json() for result in results],
        "left_out": [str(case) for case in left_out],
        "layers": by_layer,
        "seconds": perf_counter() - began,
    }


def write(path: Any, found: Mapping[str, Any]) -> None:
    """The JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(found, indent=1, default=lambda x: x.item() if isinstance(x, np.generic) else str(x)) + "\n"
    )
