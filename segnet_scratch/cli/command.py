"""Commands whose docstrings say what their options mean.

A docstring ends in a section "Options:" of lines `--flag METAVAR: meaning`, for an argument `NAME: meaning`, in the
order of the parameters. Those whose annotation says it, as those of options.py do, are left out. Another section is a
panel of the help, under its heading. A dict in an annotation holds what else typer is to know of a parameter:
Annotated[int, {"min": 1}].
"""

import re
import sys
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature, getdoc, signature
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from typer.models import ParameterInfo

Command = TypeVar("Command", bound=Callable[..., None])

_HEADING = re.compile(r"^(\S.*):\n(?= {4}\S)", re.MULTILINE)
_ENTRY = re.compile(r"((?:--[\w-]+(?:, )?)*) ?(\S*): (.*)")


def documented(function: Callable[..., Any]) -> tuple[str, list[Parameter]]:
    """The docstring of a function without its sections of options, and its parameters as typer takes them."""
    if sys.flags.optimize > 1:
        raise SystemExit("error: python -OO drops the docstrings in which the options of commands stand; use -O")
    text, *sections = _HEADING.split(getdoc(function) or "")
    entries = (
        (heading, " ".join(entry.split()))
        for heading, section in zip(sections[::2], sections[1::2], strict=True)
        for entry in re.split(r"\n(?= {4}\S)", section)
    )
    parameters = [_declared(parameter, entries) for parameter in signature(function).parameters.values()]
    left = next(entries, None)
    if left and not hasattr(function, "__signature__"):  # else: it is registered under a second name
        raise ValueError(f"{function.__name__}: {left[1]!r} documents no parameter")
    return text, parameters


def _declared(parameter: Parameter, entries: Iterator[tuple[str, str]]) -> Parameter:
    kind, known = parameter.annotation, dict[str, Any]()
    if get_origin(kind) is Annotated:
        kind, known = get_args(kind)
    if isinstance(known, ParameterInfo) or parameter.name == "network":
        return parameter
    heading, entry = next(entries, ("Options", "nothing"))
    if (found := _ENTRY.fullmatch(entry)) is None:
        raise ValueError(f"{parameter.name}: {entry!r} is no documentation of an option")
    flags, name, meaning = found.groups()
    settings: dict[str, Any] = {"help": meaning, "metavar": None if name in ("", parameter.name) else name}
    if heading != "Options":
        settings["rich_help_panel"] = heading
    settings |= known
    info = typer.Option(*flags.split(", "), **settings) if flags else typer.Argument(**settings)
    return parameter.replace(annotation=Annotated[kind, info])


def command(group: typer.Typer, name: str | None = None, **settings: Any) -> Callable[[Command], Command]:
    """Registers a function as a command of the application or of a group of it."""

    def register(function: Command) -> Command:
        text, parameters = documented(function)
        function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        group.command(name, help=text, **settings)(function)
        return function

    return register
