"""`segnet run`, `doctor`: kernels, and what this machine can do with them."""

import re
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from segnet_scratch.cli import options
from segnet_scratch.cli.command import command
from segnet_scratch.cli.common import app, console, join_ranks, say
from segnet_scratch.display import numbers_table, write_json
from segnet_scratch.lab.doctor import diagnose
from segnet_scratch.lab.doctor.kernels import examine_kernels
from segnet_scratch.lab.workbench import KernelRun, run_kernel
from segnet_scratch.progress import watched


@command(app, "run")
def run_command(
    kernel: str,
    shape: options.Texts = None,
    arg: options.Texts = None,
    content: options.Texts = None,
    reference: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    orders: Annotated[int | None, {"min": 0}] = None,
    sanitize: bool = False,
    device: str = "host",
    grid: str | None = None,
    block: str | None = None,
    shared: options.Number = 0,
    dtype: Annotated[str, options.one_of(("float32", "float64"))] = "float32",
    seed: options.Number = 0,
    output: Path | None = None,
    json: options.Json = None,
) -> None:
    """Run one kernel, of this project or your own, and check it; exit code 1 where a check fails.

    Example: segnet run add.cu --shape a=99 --shape b=99 --shape c=99 --arg n=99 --reference add.py:add --orders 6

    Checked always: accesses outside the arrays, elements never written, changed inputs, memory read before it is
    written, NaN out of finite inputs, barriers that not all threads reach, descending order of threads and blocks.

    Options:
        kernel: A kernel of this project, file.cu, or file.cu:kernel.
        --shape NAME=DIMS: Shape of an array, once for each: x=2,45,37.
        --arg NAME=VALUE: A scalar, once for each: n=1000.
        --input NAME=FILE.npy: What an array holds before: a file, a number, random, or null. Without it inputs (const
            pointers) are random and outputs hold NaN.
        --reference FILE.py:FUNCTION: A NumPy function that takes inputs and scalars by name and returns the outputs: an
            array, a tuple or a dict.
        --rtol: Relative tolerance; 1e-5, in float64 1e-12.
        --atol: Absolute tolerance; the same.
        --orders N: N shuffled orders of threads and blocks: the same bits? If not, who disturbs whom.
        --sanitize: Also with AddressSanitizer and UBSan, and local variables of unlike contents.
        --device host|cuda: host: on the CPU. cuda: on a GPU.
        --grid: Blocks, X or X,Y or X,Y,Z; else they cover the output.
        --block: Threads of a block; else __launch_bounds__, or 256.
        --shared: Bytes of dynamic shared memory.
        --type: What storage_t is.
        --seed: Of the random inputs.
        --output DIR: Save every array as DIR/NAME.npy.
    """
    result = run_kernel(
        kernel,
        shapes=options.by_name("--shape", shape, options.shape),
        arguments=options.by_name("--arg", arg, options.number),
        inputs=options.by_name("--input", content, options.contents),
        device=device,
        grid=None if grid is None else options.shape("--grid", grid),
        block=None if block is None else options.shape("--block", block),
        shared=shared,
        dtype=dtype,
        seed=seed,
        reference=reference,
        rtol=rtol,
        atol=atol,
        orders=orders,
        sanitize=sanitize,
    )
    _show(result)
    write_json(json, result.to_json())
    if output is not None:
        say(f"{len(result.save(output))} arrays saved in {output}")
    if not result.passed:
        raise typer.Exit(1)


@command(app)
def doctor(kernels: bool = False, json: options.Json = None) -> None:
    """Say what works on this machine, what does not, and the command that fixes it.

    Exit code 1 where no device can train. With --kernels, which needs NVRTC but no GPU: 1 where registers spill to
    memory beyond what the budget (runtime/budget.toml) accepts.

    Options:
        --kernels: Instead compile every kernel for every GPU, and show what it takes of one.
    """
    if not join_ranks().leads:
        return
    if kernels:
        with watched(console, "compiling kernels") as watch:
            report = examine_kernels(watch.update)
    else:
        with console.status("examining this machine"):
            report = diagnose()
    for line, style in report.lines():
        say(line, style)
    write_json(json, report.to_json())
    if not report.passed:
        raise typer.Exit(1)


def _show(run: KernelRun) -> None:
    """Prints a run."""
    s = run.setup
    shared = f", {s.shared} bytes of dynamic shared memory" if s.shared else ""
    say(
        f"{s.kernel.name} ({s.kernel.source.path.name}:{s.kernel.line}) on {run.device}, {s.types.name}: "
        f"grid {_size(s.grid)}, block {_size(s.block)}{shared}"
    )
    if s.scalars:
        say("  " + ", ".join(f"{k} = {v}" for k, v in s.scalars.items()))
    console.print(_arrays(run))
    meaning = "on the CPU: it says nothing about a GPU" if run.device == "host" else "from launch to completion"
    time = f"{run.seconds * 1e3:.3g} ms ({meaning})" if run.seconds else "did not finish"
    say(f"{s.blocks * prod(s.block)} threads: {time}")
    for check in run.checks:
        verdict = Text("ok    ", "green") if check.passed else Text("FAILED", "bold red")
        message = check.message.replace("\n", "\n       ")
        console.print(verdict, f"{check.name}: {message}", soft_wrap=True)


def _size(size: tuple[int, ...]) -> str:
    return re.sub(r"( x 1)+$", "", " x ".join(map(str, size)))


def _arrays(run: KernelRun) -> Table:
    table = numbers_table("array", "min", "max", "mean", "NaN")
    for row in run.statistics():
        shape = "null" if row["shape"] is None else ",".join(map(str, row["shape"]))
        numbers = [_number(row[key]) for key in ("min", "max", "mean")]
        what = f"{row['name']}: {row['role']}, {row['dtype']}, {shape}"
        table.add_row(what, *numbers, str(row["nan"] or "-"))
    return table


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
