"""A profile as tables for a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from segnet_scratch.lab.profile.record import Profile, Summary

SLOWEST = 20  # ops that are listed one by one
# Of each column the figure of a Summary, its unit, and how it is written.
COLUMNS: dict[str, tuple[str, float, str]] = {
    "launches": ("launches", 1, "{:.0f}"),
    "barriers": ("barriers", 1, "{:.0f}"),
    "GFLOP": ("flops", 1e9, "{:.3f}"),
    "MB": ("bytes", 1e6, "{:.1f}"),
    "FLOP/B": ("intensity", 1, "{:.2f}"),
    "bytes' ms": ("seconds_of_bytes", 1e-3, "{:.3f}"),
    "ms": ("seconds", 1e-3, "{:.3f}"),
    "GFLOP/s": ("gflops_per_second", 1, "{:.1f}"),
    "GB/s": ("gbytes_per_second", 1, "{:.1f}"),
    "of copy": ("of_copy", 1e-2, "{:.0f} %"),
    "of ceiling": ("of_ceiling", 1e-2, "{:.0f} %"),
}

Row = tuple[Sequence[str], str]  # cells and their style


def print_columns(console: Console, columns: Sequence[str], rows: Sequence[Row], total: Row | None = None) -> None:
    """As many columns side by side as the terminal has room for, the others below: no line is broken, no number cut."""

    def table(begin: int, end: int) -> Table:
        part = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in (columns[0], *columns[begin:end]):
            part.add_column(column, justify="left" if column is columns[0] else "right", no_wrap=True)
        for cells, style in rows:
            part.add_row(cells[0], *cells[begin:end], style=style)
        if total is not None:
            part.add_section()
            part.add_row(total[0][0], *total[0][begin:end], style=total[1])
        return part

    unlimited, begin = console.options.update(max_width=10_000), 1
    while begin < len(columns):
        end = len(columns)
        while end > begin + 1 and console.measure(table(begin, end), options=unlimited).maximum > console.width:
            end -= 1
        console.print(table(begin, end))
        begin = end


def show(console: Console, profile: Profile, by_layer: bool) -> None:
    """Prints what was found: by op (or by rung), by layer where there are layers, kernels, ceilings and messages."""
    where = "counted, not computed" if profile.device == "counting" else f"on {profile.device}"
    console.print(f"{profile.title}, {where}", style="bold", soft_wrap=True)
    total = profile.total
    counts = ["launches"] * (total.launches > 0) + ["barriers"] * (total.barriers > 0)
    timed = total.seconds is not None
    times = ["bytes' ms", "ms", "share", "of copy", "of ceiling", "GFLOP/s", "GB/s"] if timed else []
    columns = [*times, "GFLOP", "MB", "FLOP/B", *counts]

    def cells(s: Summary, columns: Sequence[str]) -> list[str]:
        return [s.key, *(_cell(s, column, profile) for column in columns)]

    def sums(first: str, summaries: Sequence[Summary], columns: Sequence[str], whole: Summary | None = None) -> None:
        headings = [first, *("runs" if column == "passes" else column for column in columns)]
        last = None if whole is None else (cells(whole, columns), "bold")
        print_columns(console, headings, [(cells(s, columns), "") for s in summaries], last)

    if by_layer:
        sums("op", sorted(profile.by(lambda run: run.name), key=_longest_first), ["runs", *columns], total)
        halves = ["bytes' ms", "forward ms", "backward ms", "share", "of ceiling"] if timed else []
        sums("layer", profile.by(lambda run: run.layer), [*halves, "GFLOP", "MB"])
        if timed:
            slowest = sorted(profile.each(), key=_longest_first)[:SLOWEST]
            sums("slowest ops", slowest, ["layer", "phase", *times, "GFLOP", "MB"])
    else:  # in the order of the ladder
        sums("op and rung", profile.by(lambda run: run.layer), ["passes" if timed else "runs", *columns])
    if profile.kernels:
        wide = ["kernel", "GPU", "launches", "threads", "registers", "spills", "shared", "occupancy", "limited by"]
        names = ("kernel", "architecture", "launches", "threads", "registers", "spill_bytes", "shared_bytes")
        rows = []
        for kernel in profile.kernels:
            shown = [*(str(kernel[name]) for name in names), f"{100 * kernel['occupancy']:.0f} %", kernel["limited_by"]]
            rows.append((shown, "red" if kernel["spill_bytes"] else ""))
        print_columns(console, wide, rows)
    for line in _footnotes(profile):
        console.print(line, style="dim", soft_wrap=True)
    for message in profile.messages:
        console.print(message, style="yellow", soft_wrap=True)


def _longest_first(summary: Summary) -> float:
    return -(summary.seconds or summary.flops)


def _cell(s: Summary, column: str, profile: Profile) -> str:
    """What stands in a column of this name."""
    if column in COLUMNS:
        figure, unit, form = COLUMNS[column]
        value = getattr(s, figure)
        return "-" if value is None else form.format(value / unit)
    seconds = s.seconds or 0.0
    forward = Summary("", [run for run in s.runs if run.phase == "forward"]).seconds or 0.0
    return {
        "runs": str(len(s.runs)),
        "passes": str(max(len(run.times) for run in s.runs)),
        "layer": s.runs[0].layer,
        "phase": s.runs[0].phase,
        "forward ms": f"{1e3 * forward:.3f}",
        "backward ms": f"{1e3 * (seconds - forward):.3f}",  # everything after it
        "share": f"{100 * seconds / (profile.total.seconds or 1.0):.1f} %",
    }[column]


def _footnotes(profile: Profile) -> list[str]:
    lines = []
    if profile.ceilings is not None:
        c = profile.ceilings
        rungs = "".join(f", {rung} {flops / 1e9:.1f}" for rung, flops in c.tensor_cores.items())
        lines.append(f"ceilings: {c.flops / 1e9:.1f} GFLOP/s{rungs}, {c.bandwidth / 1e9:.1f} GB/s ({c.source})")
        lines.append("FLOP, MB: by the definition of each op; bytes' ms: what the MB take at the rate of a large copy")
        lines.append("ms: medians; of copy: bytes' ms / ms; of ceiling: shortest possible time / time")
    between = profile.communication
    if between["seconds"]:
        whole = profile.total.seconds or 1.0
        lines.append(
            f"between ranks: {1e3 * between['seconds']:.3f} ms; computing waits {1e3 * between['exposed']:.3f} ms "
            f"for it, {100 * between['exposed'] / whole:.1f} % of the step"
        )
    if profile.device == "numpy":
        lines.append("above 100 %: Winograd's convolution multiplies less than the definition, and caches save traffic")
    if profile.parameters:
        memory = [f"{name} {nbytes / 1e6:.1f} MB" for name, nbytes in profile.memory.items()]
        lines.append(", ".join([f"{profile.parameters:,} parameters", *memory]))
    return lines
