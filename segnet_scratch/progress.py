"""How far a long command has come: a bar in a terminal, elsewhere a line now and then."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from segnet_scratch.errors import printable

SECONDS_BETWEEN_LINES = 30.0  # where the output is no terminal
_NARROW = 80  # columns below which the bar gives way to the numbers


def bar(console: Console, *more: ProgressColumn, transient: bool = True, left: bool = True) -> Progress:
    """A bar with its numbers in a terminal, nothing elsewhere. `more` are columns in the place of the count.

    Without `left` the status says how much time is left.
    """
    whole = Column(no_wrap=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=whole)]
    columns += [BarColumn(bar_width=24)] if console.width >= _NARROW else []
    columns += more or (MofNCompleteColumn(table_column=whole),)
    columns += [TextColumn("{task.fields[status]}", markup=False, table_column=whole)]
    columns += [TimeRemainingColumn(table_column=whole)] if left else []
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


class Watch:
    """Told how much is done of how much; draws a bar in a terminal, and prints a line every half minute elsewhere."""

    def __init__(self, console: Console, progress: Progress, what: str, total: int | None) -> None:
        self._console, self._progress, self._what = console, progress, printable(what)
        self._task = progress.add_task(self._what, total=total, status="")
        self._done, self._total, self._began = 0, total, perf_counter()
        self._last_line = self._began

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.remove_task(self._task)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.update(self._done + count, self._total)

    def say(self, status: str) -> None:
        """One thing more is done of nobody knows how many, and this one has begun."""
        self.update(self._done + 1, None, status)

    def update(self, done: int, total: int | None, status: str = "") -> None:
        """So many are done in all, of `total`, where that is known."""
        self._done, self._total = done, total or None
        self._progress.update(self._task, completed=done, total=self._total, status=status)
        now = perf_counter()
        if not self._console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._began) * (self._total - done) / done if self._total and done else math.nan
            parts = f"{self._what} {done}{f'/{self._total}' if self._total else ''}", status, remaining(left)
            self._console.print("  ".join(part for part in parts if part), soft_wrap=True)


@contextmanager
def watched(console: Console, what: str, total: int | None = None) -> Iterator[Watch]:
    """Progress of what the block does."""
    with bar(console) as progress:
        yield Watch(console, progress, what, total)


def remaining(seconds: float) -> str:
    """`0:01:40 left`; empty where it is not known."""
    if not math.isfinite(seconds):
        return ""
    minutes, second = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d} left"
