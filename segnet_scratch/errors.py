"""The project's own errors. Each message names the thing, what was expected, what was got, and the fix."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

_NAMED = 5


def printable(text: str) -> str:
    r"""The text with escapes (`\n`) for what is no print: a name may hold a line break, or what steers a terminal."""
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def some_of(things: Sequence[object]) -> list[str]:
    """Lines of a message that name the first of many things, and say how many more there are."""
    more = [f"  and {len(things) - _NAMED} more"] if len(things) > _NAMED else []
    return [f"  {thing}" for thing in things[:_NAMED]] + more


class SegnetError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback.

    Each argument is one line of the message, whatever names stand in it.
    """

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class ShapeError(SegnetError):
    """Arrays whose shapes do not fit together or do not fit the operation."""


class DTypeError(SegnetError):
    """An array or scalar of an element type that the operation does not take."""


class DeviceError(SegnetError):
    """A device that is missing, or an array that lives on another device."""


class DeviceMemoryError(DeviceError):
    """A device's memory is used up: `asked` bytes were wanted, `free` bytes are left."""

    def __init__(self, message: str, asked: int, free: int) -> None:
        super().__init__(message)
        self.asked, self.free = asked, free


class CompileError(SegnetError):
    """A kernel source that does not compile, or no compiler to compile it with."""


class LaunchError(SegnetError):
    """A launch refused by the gate: argument count, contiguity, size, grid or block limits."""


class KernelFault(SegnetError):
    """A fault of a kernel noticed while it ran: divergent barrier, overrun of shared memory."""


class DataError(SegnetError):
    """A data set, image, mask or label that cannot be used; the message names the file."""


class ConfigError(SegnetError):
    """An unknown configuration key, a value of the wrong type or out of range."""


class CheckpointError(SegnetError):
    """A weights file that is missing, damaged, or made for another model."""


class TrainingError(SegnetError):
    """Training cannot go on: a loss that is not finite, a run folder that is already in use."""


class MissingLibraryError(SegnetError):
    """A library of an optional feature that is not installed; the message names the extra that brings it."""


@contextmanager
def of_file(path: str | Path) -> Iterator[None]:
    """What the block says of settings or weights is said of this file."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error.args[0]}", *error.args[1:]) from error


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports a library; MissingLibraryError with the command that installs it where that fails."""
    try:
        return import_module(module)
    except ImportError as error:
        problem = f"expected the library {module}, which cannot be imported ({error})"
        raise MissingLibraryError(f"{purpose}: {problem}; pip install 'segnet_scratch[{extra}]'") from error
