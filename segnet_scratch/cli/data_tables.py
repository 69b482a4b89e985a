"""What `segnet data ...` shows: progress, and tables of a verification and of class statistics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from segnet_scratch.data.findings import CODES
from segnet_scratch.data.statistics import ClassStatistics
from segnet_scratch.data.verify import Report

_EXAMPLES = 3  # of each code
_SIZES = 3  # the commonest


@contextmanager
def counted(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in a terminal, nothing elsewhere; gives a function that is told how many of how many are done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def transferred(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of an installation, with bytes, rate and time left; without a terminal a line for each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
                if not console.is_terminal:
                    console.print(f"{what} ...")
            progress.update(tasks[what], completed=done)

        yield report


def facts_table(report: Report) -> Table:
    """How much there is of everything."""
    table = Table(title=str(report.root), show_header=False)
    table.add_row("ids", ", ".join(f"{_printable(split)} {count}" for split, count in report.splits.items()) or "-")
    sizes = [f"{width} x {height}: {count}" for (height, width), count in report.sizes.most_common(_SIZES)]
    more = [f"{len(report.sizes) - _SIZES} other sizes"] if len(report.sizes) > _SIZES else []
    table.add_row("images", f"{report.sizes.total()} of {report.pairs} readable")
    table.add_row("width x height", ", ".join([*sizes, *more]) or "-")
    table.add_row("image modes", ", ".join(f"{mode} {count}" for mode, count in report.image_modes.items()) or "-")
    table.add_row("mask modes", ", ".join(f"{mode} {count}" for mode, count in report.mask_modes.items()) or "-")
    table.add_row("void", f"{100 * report.void_share:.2f} % of the pixels")
    table.add_row("in no list", ", ".join(f"{count} files in {folder}" for folder, count in report.unlisted.items()))
    return table


def labels_table(report: Report) -> Table:
    """Share of pixels (void left out) and number of masks by class."""
    table = Table()
    for heading in ("label", "class", "pixels %", "masks"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    pixels = report.pixels[: len(report.names)]
    for label, (name, share) in enumerate(zip(report.names, pixels / max(1, int(pixels.sum())), strict=True)):
        table.add_row(str(label), _printable(name), f"{100 * share:.3f}", str(report.images[label]))
    return table


def finding_lines(report: Report) -> Iterator[tuple[str, str]]:
    """Lines with their styles: each code with its meaning and number, below it the first findings."""
    for code, findings in report.by_code().items():
        kind, style = ("error", "bold red") if findings[0].is_error else ("warning", "yellow")
        yield f"{kind} {code}: {CODES[code]} ({len(findings)})", style
        for finding in findings[:_EXAMPLES]:
            yield _printable(f"  {finding.path}: {finding.detail}"), ""
        if len(findings) > _EXAMPLES:
            yield f"  and {len(findings) - _EXAMPLES} more", ""


def statistics_table(statistics: ClassStatistics, split: str) -> Table:
    """Pixels, masks, frequency and weight by class."""
    table = Table(title=f"{split}: {statistics.masks} masks, {statistics.void:,} pixels void")
    for heading in ("label", "class", "pixels", "pixels %", "masks", "frequency", "weight"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    rows = zip(
        statistics.names,
        statistics.pixels,
        statistics.share,
        statistics.images,
        statistics.frequency,
        statistics.weights,
        strict=True,
    )
    for label, (name, pixels, share, images, frequency, weight) in enumerate(rows):
        seen = "-" if np.isnan(frequency) else f"{frequency:.5f}"
        table.add_row(str(label), name, f"{pixels:,}", f"{100 * share:.3f}", str(images), seen, f"{weight:.4f}")
    return table


def _printable(text: str) -> str:
    """The text without control characters: names out of a damaged data set must not steer the terminal."""
    return "".join(mark if mark.isprintable() else "?" for mark in text)
