"""What every command shares: the application, its consoles, exit codes."""

import errno
import io
import logging
import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any, NoReturn, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from segnet_scratch import __version__
from segnet_scratch.errors import SegnetError, printable
from segnet_scratch.parallel import Communicator, world


class Output(io.TextIOBase):
    """sys.stdout or sys.stderr, as it is when something is written, for a rich Console.

    A reader that has gone (`| head`), a closed terminal or a full disk silences it, once and for all; a name that the
    encoding lacks, as one of another locale, is shown with escapes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._silenced: TextIO | None = None
        self.fault: OSError | None = None  # what silenced it

    def write(self, text: str) -> int:
        """Writes what can be written."""
        encoding = self.encoding
        encodable = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda stream: stream.write(encodable))
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        self._attempt(lambda stream: stream.flush())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream, by which rich chooses the characters of its bars."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal that still takes what is written."""
        with suppress(OSError, ValueError, AttributeError):
            return self._stream is not self._silenced and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """That of the stream."""
        return int(self._stream.fileno())

    @property
    def _stream(self) -> Any:
        return getattr(sys, self._name)  # None where the descriptor was closed when Python started

    def _attempt(self, act: Any) -> None:
        stream = self._stream
        if stream is None or stream is self._silenced:
            return
        try:
            act(stream)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._silenced = stream
            self.fault = error if isinstance(error, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
            # What it still holds would be an error again when Python ends.
            with suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


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
