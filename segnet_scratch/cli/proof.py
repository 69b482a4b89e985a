"""`segnet gradcheck`, `verify`: is what this project computes right, on this machine?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from math import inf
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from segnet_scratch.cli import options
from segnet_scratch.cli.command import command
from segnet_scratch.cli.common import app, console, fail, problems, say
from segnet_scratch.display import write_json
from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.proof.differentiable import Chosen
from segnet_scratch.lab.proof.gradcheck import Result
from segnet_scratch.lab.proof.gradcheck import gradcheck as run_gradcheck
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.verify import verify as run_verify
from segnet_scratch.lab.proof.work import FULL, QUICK
from segnet_scratch.lab.workbench.sanitizers import read_reports, sanitized_environment
from segnet_scratch.progress import watched
from segnet_scratch.runtime.devices import Device, HostDevice, get_device
from segnet_scratch.runtime.host import ORDERS, HostOptions

_WHERE = "by, numeric, backward"  # gives way in a narrow terminal
_SANITIZED = "SEGNET_SANITIZED"  # set in the process under the sanitizers


_ORDERS = "In which order the host device runs threads and blocks; shuffled goes by --seed."
Order = Annotated[str, typer.Option(help=_ORDERS, **options.one_of(ORDERS))]
Sanitize = Annotated[
    bool, typer.Option("--sanitize", help="Kernels of the host device with AddressSanitizer and UBSan.")
]


@command(app)
def gradcheck(
    ops: options.Texts = None,
    shape: options.Texts = None,
    arg: options.Texts = None,
    content: options.Texts = None,
    ties: bool = False,
    dtype: Annotated[str, options.one_of(("float64", "float32"))] = "float64",
    directions: options.MaybeCount = None,
    cases: options.MaybeCount = None,
    device: options.Device = "host",
    order: Order = "ascending",
    sanitize: Sanitize = False,
    seed: options.Number = 0,
    json: options.Json = None,
) -> None:
    """Compare hand-written gradients with numeric ones, and name the worst derivative; exit code 1 where one differs.

    Central differences with step 1e-6 along every element of inputs up to 500 elements, along random directions of
    larger ones. An error of more than 1e-7 + 1e-5 |gradient| fails; for float32 1e-4 + 1e-3 |gradient|. Places where
    there is no derivative (a ReLU at 0, a tie in a pooling window) are named, and do not fail.

    Example: segnet gradcheck conv2d --shape x=2,9,7,3 --shape weight=5,3,3,3 --arg stride=2 --arg rung=direct

    Options:
        ops: Ops to check; all unless given.
        --shape NAME=DIMS: Shape of an input of a single op: x=2,9,7,3; others have defaults.
        --arg NAME=VALUE: An option of a single op: stride=2, rung=direct, p=0.3.
        --input NAME=FILE.npy: What an input of a single op holds: a file, or one number.
        --ties: Fill inputs with integers from -2 to 2, so that pools and ReLU have kinks.
        --dtype: What backward computes in; numeric gradients are taken in float64 at the same point.
        --directions N: Random directions for each input of over 500 elements; 5, networks 2.
        --cases N: Shapes of each op, or fillings of the shape given.
        --seed: Of the random inputs.
    """
    if sanitize and _SANITIZED not in os.environ:
        _repeat_sanitized(device)
    chosen = Chosen(
        options.by_name("--shape", shape, options.shape),
        options.by_name("--arg", arg, _number_or_word),
        options.by_name("--input", content, _contents),
        ties,
    )
    results, on = [], _device(device, order, seed, sanitize)
    checks = run_gradcheck(ops or None, on, seed, cases, dtype=np.dtype(dtype), directions=directions, chosen=chosen)
    with watched(problems, "checking") as watch:
        for result in checks:
            results.append(result)
            watch.advance(1)
    console.print(_gradients_table(results))
    for result in results:
        for line in _remarks(result):
            say(line, "" if result.passed else "bold red")
    write_json(json, [result.to_json() for result in results])
    failed = [result.op for result in results if not result.passed]
    if failed:
        fail(f"the gradients of {', '.join(failed)} differ", 1)
    what = f"{len(results)} {'op' if len(results) == 1 else 'ops'}"
    if not any(result.compared for result in results):
        say(f"{what} not differentiable at any place that was looked at: nothing is shown, use other inputs")
    else:
        say(f"{what} passed on {device}")


def _number_or_word(option: str, text: str) -> int | float | str:
    try:
        return options.number(option, text)
    except ConfigError:
        return text


def _contents(option: str, text: str) -> Any:
    if text in ("random", "null"):
        raise ConfigError(f"{option}: expected FILE.npy or a number")
    return options.contents(option, text)


def _device(name: str, order: str, seed: int, sanitize: bool) -> Device:
    """The device; the host with options where they are not the usual ones."""
    if order == "ascending" and not sanitize:
        return get_device(name)
    if name != "host":
        raise ConfigError(f"--order and --sanitize work on the host device, not on {name}")
    return HostDevice(HostOptions(order, seed, sanitize=sanitize))


def _repeat_sanitized(device: str) -> None:
    """Runs this command again with the sanitizers' library, which has to come first, shows its reports, and ends."""
    if device != "host":
        raise ConfigError(f"--sanitize works on the host device, not on {device}")
    environment = {**sanitized_environment(), _SANITIZED: "1"}
    command = [sys.executable, "-P", "-m", "segnet_scratch", *sys.argv[1:]]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    reports = read_reports(result.stderr, "gradcheck")
    if not reports:
        sys.stderr.write(result.stderr)
        sys.exit(result.returncode)
    for report in reports:
        problems.print(report, soft_wrap=True)
    fail(f"the sanitizers found {len(reports)} {'fault' if len(reports) == 1 else 'faults'}", 1)


def _gradients_table(results: list[Result]) -> Table:
    limits = ", ".join(sorted({f"{r.limit:.0e}" for r in results}))
    table = Table(title=f"worst error, and where; up to {limits} passes", box=SIMPLE)
    for column in ("op", "verdict", "cases", "compared", "kinks", "error", _WHERE, "s"):
        justify: JustifyMethod = "left" if column in ("op", "verdict", _WHERE) else "right"
        table.add_column(column, justify=justify, no_wrap=column != _WHERE, overflow="fold")
    for r in results:
        style = {"passed": "green", "FAILED": "bold red"}.get(r.verdict, "yellow")
        worst = f"{r.where.place} {r.where.numeric:.7g} {r.where.analytic:.7g}" if r.where else "-"
        numbers = [str(r.cases), str(r.compared), f"{r.skipped:.1%}", f"{r.worst:.1e}"]
        table.add_row(r.op, Text(r.verdict, style), *numbers, worst, f"{r.seconds:.1f}")
    return table


def _remarks(result: Result) -> Iterator[str]:
    """Where the worst derivative of a failure is, and the places without derivative."""
    if not result.passed:
        yield from str(result).splitlines()
    for kink in result.kinks:
        yield f"{result.op}: {kink}"
    if result.kinks and result.given_up > len(result.kinks):
        yield f"{result.op}: ... {result.given_up} differences met a kink"


# ------------------------------------------------------------------------------------------------ verify


@command(app)
def verify(
    full: bool = False,
    device: options.Texts = None,
    only: Annotated[list[str] | None, typer.Option(metavar="PART", help=f"Once for each: {', '.join(PARTS)}.")] = None,
    row: options.Texts = None,
    order: Order = "ascending",
    sanitize: Sanitize = False,
    seed: options.Number = 0,
    minutes: Annotated[float | None, {"min": 0}] = None,
    json: options.Json = None,
) -> None:
    """Prove on this machine that every kernel is right, no GPU needed; exit code 1 where something does not hold.

    About a minute on two cores, and two more where kernels have to be compiled first. Each part is one property of
    every row of the op table; docs/explanation/proof.md says which, and what they cannot show. The JSON file is
    written after each part.

    Example: segnet verify --only orders --only sanitizers --row conv2d_forward_tiled

    Options:
        --full: At the full figures: less than an hour on two cores.
        --device host|numpy|cuda|all: Once for each; all that this machine has unless given.
        --row ROW: Only this row of the op table, such as conv2d_forward_tiled.
        --seed: Of random shapes and inputs.
        --minutes: Begin nothing after so long; a GPU has a few cases of everything first, and random ones to the end.
    """
    devices = None if not device or "all" in device else device
    with watched(problems, "verifying") as watch:
        report = run_verify(
            *(devices, FULL if full else QUICK, seed, only, row, order, sanitize),
            minutes=inf if minutes is None else minutes,
            keep=lambda report: write_json(json, report.to_json()),
            progress=watch.update,
        )
    for verdict, text in report.text():
        say(text, {"passed": "green", "skipped": "yellow"}.get(verdict, "bold red"))
    if not report.passed:
        raise typer.Exit(1)
