"""What `segnet run` takes on the command line, as the values that `run_kernel` takes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.workbench.setup import Contents, Shape

T = TypeVar("T")


def by_name(option: str, texts: Sequence[str] | None, convert: Callable[[str, str], T]) -> dict[str, T]:
    """NAME=VALUE texts as a dict; `convert` gets the option, for messages, and the value."""
    values: dict[str, T] = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(
                f"{option} {text}: expected NAME=VALUE, for example {option} x={_EXAMPLES.get(option, '1')}"
            )
        if name in values:
            raise ConfigError(f"{option} {text}: {name} is given twice")
        values[name] = convert(f"{option} {text}", value)
    return values


_EXAMPLES = {"--shape": "2,45,37,64", "--arg": "1000", "--input": "x.npy"}


def shape(option: str, text: str) -> Shape:
    """Sizes separated by commas or x: 2,45,37,64 or 16x16."""
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"{option}: expected positive sizes separated by commas, for example 2,45,37,64")
    return sizes


def number(option: str, text: str) -> int | float:
    """An integer if it is written as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"{option}: expected a number")


def contents(option: str, text: str) -> Contents:
    """FILE.npy, a number, `random`, or `null`."""
    if text in ("random", "null"):
        return text if text == "random" else None
    if not text.endswith(".npy"):
        return number(f"{option} (or FILE.npy, random, null)", text)
    try:
        return np.asarray(np.load(Path(text), allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{option}: cannot read {text}: {error}") from error
