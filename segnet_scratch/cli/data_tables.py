"""What `segnet data ...` shows: progress, and tables of a verification and of class statistics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn
from rich.table import Table

from segnet_scratch.data.findings import CODES
from segnet_scratch.data.statistics import ClassStatistics
from segnet_scratch.data.verify import Report
from segnet_scratch.display import numbers_table
from segnet_scratch.errors import printable
from segnet_scratch.progress import Watch, bar

_EXAMPLES = 3  # of each code
_SIZES = 3  # the commonest


@contextmanager
def transferred(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of each stage of an installation, with bytes, rate and time left; gives (stage, done, total)."""
    with bar(console, DownloadColumn(), TransferSpeedColumn(), transient=False) as progress:
        watches: dict[str, Watch] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in watches:
                watches[what] = Watch(console, progress, what, total)
                if not console.is_terminal:
                    console.print(f"{what} ...")
            watches[what].update(done, total)

        yield report


def facts_table(report: Report) -> Table:
    """How much there is of everything."""
    table = Table(title=printable(str(report.root)), show_header=False)
    table.add_row("ids", ", ".join(f"{printable(split)} {count}" for split, count in report.splits.items()) or "-")
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
    table = numbers_table("class", "pixels %", "masks", first="label")
    pixels = report.pixels[: len(report.names)]
    for label, (name, share) in enumerate(zip(report.names, pixels / max(1, int(pixels.sum())), strict=True)):
        table.add_row(str(label), printable(name), f"{100 * share:.3f}", str(report.images[label]))
    return table


def finding_lines(report: Report) -> Iterator[tuple[str, str]]:
    """Lines with their styles: each code with its meaning and number, below it the first findings."""
    for code, findings in report.by_code().items():
        kind, style = ("error", "bold red") if findings[0].is_error else ("warning", "yellow")
        yield f"{kind} {code}: {CODES[code]} ({len(findings)})", style
        for finding in findings[:_EXAMPLES]:
            yield printable(f"  {finding.path}: {finding.detail}"), ""
        if len(findings) > _EXAMPLES:
            yield f"  and {len(findings) - _EXAMPLES} more", ""


def statistics_table(statistics: ClassStatistics, split: str) -> Table:
    """Pixels, masks, frequency and weight by class."""
    table = numbers_table("class", "pixels", "%", "masks", "frequency", "weight", first="#")
    table.title = f"{split}: {statistics.masks} masks, {statistics.void:,} pixels void"
    columns = ("names", "pixels", "share", "images", "frequency", "weights")
    rows = zip(*(getattr(statistics, column) for column in columns), strict=True)
    for label, (name, pixels, share, images, frequency, weight) in enumerate(rows):
        seen = "-" if np.isnan(frequency) else f"{frequency:.5f}"
        table.add_row(str(label), name, f"{pixels:,}", f"{100 * share:.3f}", str(images), seen, f"{weight:.4f}")
    return table
