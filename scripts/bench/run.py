"""Cases in a budget of time: gate, ceilings, times in turn; a table and JSON."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.cases import CASES, Case
from bench.timing import Clock, CudaClock, Times, in_turn, latencies
from segnet_scratch.files import write_durably
from segnet_scratch.runtime.compilation import compile_for
from segnet_scratch.runtime.devices import Device
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

    def best(self, side: str) -> str:
        """The fastest contender of "ours" or "PyTorch"."""
        return min((n for n in self.times if n.startswith(side)), key=lambda name: self.times[name].median)

    @property
    def speedup(self) -> float:
        """PyTorch's best time over ours."""
        return self.times[self.best("PyTorch")].median / self.times[self.best("ours")].median

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
    result.times = in_turn(calls, clock, seconds) if case.on_gpu else in_turn(calls, clock, seconds, 1)
    if case.batch == 1 and case.on_gpu:
        result.latency = latencies(calls, clock)
    return result


def _rotating(call: Callable[[int], object]) -> Callable[[], object]:
    """Each call takes the next of the batches, so that none stays in a cache."""
    numbers = itertools.cycle(range(INPUTS))
    return lambda: call(next(numbers))


def report(results: Sequence[Result], device: str) -> Table:
    """Ours beside PyTorch's best, a line a case."""
    table = Table(title=f"milliseconds a batch on {device}: median (quartiles)")
    for column in ("case", "ours", "", "PyTorch's best", "", "speed-up", "target", "memory, ours / PyTorch"):
        table.add_column(column)
    for result in results:
        cells = []
        best = [result.best(side) for side in ("ours", "PyTorch")]
        for name in best:
            low, middle, high = (1e3 * seconds for seconds in np.percentile(result.times[name].seconds, (25, 50, 75)))
            cells += [f"{middle:.2f} ({low:.2f} - {high:.2f})", name.split(", ", 1)[1]]
        ours, peer = (result.memory[name] for name in best)
        met = "met" if result.speedup >= result.case.target else "MISSED"
        share = f"{ours / peer:.2f}" if peer else "-"
        table.add_row(str(result.case), *cells, f"{result.speedup:.2f}", f"{result.case.target} {met}", share)
    return table


def run(
    device: Device,
    cases: Sequence[Case],
    seconds: float,
    thorough: bool,
    keep: Callable[..., None],
    memory_of: Callable[[Case, str], int] | None = None,
) -> None:
    """The cases in turn, the most important first; leaves out what the budget of seconds has no room for.

    `keep` takes what was found after each case. `thorough`: every case and every way to run PyTorch, more time for
    each. `memory_of` measures bytes where only a process of its own can.
    """
    import torch

    from bench import gate, layers
    from bench.contenders import makers_of

    began, on_gpu = perf_counter(), device.gpu is not None
    clock = CudaClock() if on_gpu else Clock()
    precisions = tuple(dict.fromkeys(case.precision for case in cases))
    errors = gate.errors_of(device, cases[0].width, on_gpu=on_gpu, precisions=precisions)
    verdicts = {precision: gate.right(measured) for precision, measured in errors.items()}
    for precision, measured in errors.items():
        for contender, e in measured.items():
            mark = "" if verdicts[precision].get(contender, True) else "  WRONG: not timed"
            console.print(f"{precision}: {contender}: logits {e['logits']:.1e}, gradients {e['gradients']:.1e}{mark}")
    keep(errors=errors)
    if on_gpu:
        limits = layers.ceilings(clock, 4.0 if thorough else 1.0)
        console.print(", ".join(f"{what} {value:.1f}" for what, value in limits.items()))
        keep(ceilings=limits)
    results: list[Result] = []
    left_out: list[Case] = list(cases)
    longest, each = 0.0, THOROUGH_SECONDS if thorough else CASE_SECONDS
    while left_out and (thorough or perf_counter() - began + longest < seconds):
        case, start = left_out.pop(0), perf_counter()
        # The fused engine is for GPUs: on a CPU the layers are what one trains with.
        right = [name for name, fine in verdicts[case.precision].items() if fine and (on_gpu or "layers" in name)]
        makers = makers_of(case, device, right, thorough)
        try:
            results.append(run_case(case, makers, clock, each if on_gpu else 0.0))
        except RuntimeError as error:
            console.print(f"error: {error}")
            continue
        result = results[-1]
        if memory_of is not None:
            result.memory = {name: memory_of(case, name) for name in result.times}
        longest = max(longest, perf_counter() - start)
        console.print(f"{case}: {result.speedup:.2f} x ({result.best('ours')} / {result.best('PyTorch')})")
        keep(cases=[result.to_json() for result in results], left_out=[str(other) for other in left_out])
    if thorough and on_gpu:
        keep(layers=list(layers.convolutions(CASES[0], device, clock, 0.1 * seconds)))
    console.print(report(results, torch.cuda.get_device_name() if on_gpu else "this CPU"))
    if left_out:
        console.print("left out, for want of time: " + "; ".join(map(str, left_out)))


def compile_kernels(device: Device) -> None:
    """All that the device can run, on all cores."""
    with console.status("compiling kernels") as status:
        kernels = [
            (kernel, ElementTypes.named(element))
            for kernel in shipped_kernels().values()
            if device.architecture is None or kernel.source.compiles_for(device.architecture)
            for element in kernel.source.elements
            if element != "float64"
        ]
        compile_for(device, kernels, lambda done, total: status.update(f"compiling kernels, {done} of {total}"))


def write(path: Path, found: Mapping[str, Any]) -> None:
    """The JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.dumps(found, indent=1, default=lambda v: v.item() if isinstance(v, np.generic) else str(v))
    write_durably(path, [plain.encode() + b"\n"])
