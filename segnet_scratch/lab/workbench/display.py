"""What `segnet run` shows: the launch, its arrays, the time, the verdicts."""

from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from segnet_scratch.lab.workbench.result import KernelRun


def show(console: Console, run: KernelRun) -> None:
    """Prints a run."""
    s = run.setup
    shared = f", {s.shared} bytes of dynamic shared memory" if s.shared else ""
    console.print(
        f"{s.kernel.name} ({s.kernel.source.path.name}:{s.kernel.line}) on {run.device}, {s.types.name}: "
        f"grid {_size(s.grid)}, block {_size(s.block)}{shared}",
        soft_wrap=True,
    )
    if s.scalars:
        console.print("  " + ", ".join(f"{k} = {v}" for k, v in s.scalars.items()), soft_wrap=True)
    console.print(_arrays(run))
    meaning = "on the CPU: it says nothing about a GPU" if run.device == "host" else "from launch to completion"
    time = f"{run.seconds * 1e3:.3g} ms ({meaning})" if run.seconds else "did not finish"
    console.print(f"{s.blocks * prod(s.block)} threads: {time}", soft_wrap=True)
    for check in run.checks:
        verdict = Text("ok    ", "green") if check.passed else Text("FAILED", "bold red")
        first, *others = check.message.split("\n")
        console.print(verdict, f"{check.name}: {first}", soft_wrap=True)
        for line in others:
            console.print(f"       {line}", soft_wrap=True)


def _size(size: tuple[int, ...]) -> str:
    while len(size) > 1 and size[-1] == 1:
        size = size[:-1]
    return " x ".join(map(str, size))


def _arrays(run: KernelRun) -> Table:
    table = Table()
    for column in ("array", "role", "type", "shape"):
        table.add_column(column, no_wrap=True)
    for column in ("min", "max", "mean", "NaN"):
        table.add_column(column, justify="right")
    for row in run.statistics():
        shape = "null" if row["shape"] is None else ",".join(map(str, row["shape"]))
        numbers = [_number(row[key]) for key in ("min", "max", "mean")]
        table.add_row(row["name"], row["role"], row["dtype"], shape, *numbers, str(row["nan"] or "-"))
    return table


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
