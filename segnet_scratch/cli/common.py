"""What every command shares: the application, its consoles, options of one meaning, exit codes."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from segnet_scratch import __version__
from segnet_scratch.cli.output import Output
from segnet_scratch.config import ENGINES, MINIMUM_SIZE, PRECISIONS
from segnet_scratch.errors import CheckpointError, ConfigError, SegnetError, printable
from segnet_scratch.parallel import Communicator, world
from segnet_scratch.runtime.devices import NAMES
from segnet_scratch.segnet import SegNet

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


def choice(names: Iterable[str], meaning: str, *flags: str) -> Any:
    """An option whose value is one of these words; ConfigError for any other."""
    known = tuple(names)

    def check(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
        for word in [value] if isinstance(value, str) else value or ():
            if word not in known:
                raise ConfigError(f"{option.opts[0]} {word}: expected one of {', '.join(known)}")
        return value

    return typer.Option(*flags, metavar="|".join(known), callback=check, help=meaning)


DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        help="A VOC root (with JPEGImages, SegmentationClass, ImageSets/Segmentation), or a folder above it.",
    ),
]
DeviceOption = Annotated[
    str,
    choice(
        NAMES,
        "cuda: the kernels on a GPU. host: the same kernels on the CPU, for checking. numpy: NumPy, for training "
        "without a GPU. auto: cuda where CuPy sees a GPU, else numpy.",
    ),
]
EngineOption = Annotated[
    str,
    choice(
        ENGINES,
        "fused: a few large kernels for tensor cores. layers: one kernel an op. auto: fused on a GPU of sm_80 or newer "
        "where the network fits, else layers.",
    ),
]
PrecisionOption = Annotated[
    str,
    choice(PRECISIONS, "How convolutions multiply. auto: bf16 with the fused engine on a GPU, else float32."),
]


def replaceable(beginning: str) -> Callable[[Path | None], Path | None]:
    """Refuses a file for results that begins otherwise now, as a pattern: it is an input, most often."""

    def check(path: Path | None) -> Path | None:
        if path is not None and path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                start = file.read(80)
            if not re.match(beginning.encode(), start):
                raise typer.BadParameter(f"{path} is there already and no earlier result; choose another name")
        return path

    return check


# With `image` begins what predict writes, and so on.
_RESULTS = "image|video|miou|step|root|split|op|kernel|title|fused|passed"
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Also write the result to this file.",
        metavar="FILE",
        dir_okay=False,
        callback=replaceable(rf'(\[\n  )?\{{\n +"({_RESULTS})": |\[\]\n$'),
    ),
]
SizeOption = Annotated[
    str | None, typer.Option(help="Network input, N or HxW; as in training unless given.", metavar="N|HxW")
]
CheckpointArgument = Annotated[Path, typer.Argument(help="A checkpoint, such as RUN/best.safetensors.")]


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


def input_size(checkpoint: Path, model: SegNet, size: str | None) -> tuple[int, int]:
    """The size given as N or HxW, else the one that the model was trained at."""
    if size is None:
        if "size" not in model.metadata:
            raise CheckpointError(f"{checkpoint} does not say what size it was trained at; give --size N or --size HxW")
        height, width = model.metadata["size"]
        return height, width
    return parse_size(size)


def parse_size(size: str) -> tuple[int, int]:
    """(height, width) of `--size N` or `--size HxW`; ConfigError for anything else, or below the smallest side."""
    height, width = sides("--size", size)
    if min(height, width) < MINIMUM_SIZE:
        raise ConfigError(f"--size {size}: expected at least {MINIMUM_SIZE} pixels on each side")
    return height, width


def sides(option: str, text: str) -> tuple[int, int]:
    """(height, width) of an option's value N or HxW; ConfigError for anything else."""
    try:
        numbers = [int(part) for part in text.lower().split("x")]
        height, width = numbers if len(numbers) == 2 else numbers * 2
    except ValueError:
        raise ConfigError(f"{option} {text}: expected N or HxW, for example 224 or 360x480") from None
    return height, width


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
