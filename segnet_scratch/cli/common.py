"""What every command shares: the application, its consoles, exit codes."""

import logging
import sys
import warnings
from contextlib import suppress
from typing import Annotated, NoReturn, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from segnet_scratch import __version__
from segnet_scratch.cli.output import Output
from segnet_scratch.errors import SegnetError, printable
from segnet_scratch.parallel import Communicator, world

app = typer.Typer(
    name="segnet",
    help="SegNet without a deep learning framework. Start with: segnet demo.",
    epilog="Exit codes: 0 done, 1 an error or a failed check, 2 wrong usage or settings, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
output, errors = Output("stdout"), Output("stderr")
# No markup: paths, names of classes and messages of other programs may hold brackets, and colons that are no emoji.
console = Console(file=cast(TextIO, output), markup=False, highlight=False, emoji=False)
problems = Console(file=cast(TextIO, errors), markup=False, highlight=False, emoji=False)


def fail(message: str, code: int) -> NoReturn:
    """Prints an error and ends the program."""
    where = ""
    with suppress(SegnetError):  # it may be this that is said: that there are no ranks to be had
        where = world().label
    problems.print(Text.assemble(("error: ", "bold red"), where, message), soft_wrap=True)
    sys.exit(code)


def join_ranks() -> Communicator:
    """The ranks that mpirun has started with this process, if any; all but the first fall silent."""
    ranks = world()
    console.quiet = not ranks.leads
    return ranks


def say(text: str, style: str = "") -> None:
    """Prints one line of a result."""
    console.print(printable(text), style=style, soft_wrap=True)


def _version(requested: bool) -> None:
    if requested:
        say(f"segnet_scratch {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is compiled and where it is kept.")
    ] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    warnings.filterwarnings("ignore", module="PIL")  # what is odd in a picture is said by segnet data verify
    logging.basicConfig(level=level, format="%(message)s", handlers=[_Lines()])


class _Lines(logging.Handler):
    """Shows a message as one line, unbroken: commands in it are to be pasted."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        level = f"{record.levelname.lower()}: "
        problems.print(Text.assemble((level, style), printable(self.format(record))), soft_wrap=True)
