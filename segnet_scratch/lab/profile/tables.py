"""A profile as tables for a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from segnet_scratch.lab.profile.kernels import KernelFigures
from segnet_scratch.lab.profile.record import Profile, Summary

SLOWEST = 20  # ops that are listed one by one


def _print(console: Console, table: Table) -> None:
    """In its full width: a narrow terminal breaks lines, but no number is cut."""
    width = console.measure(table, options=console.options.update(max_width=200)).maximum
    before, console.width = console.width, max(console.width, width)
    console.print(table)
    console.width = before


def show(console: Console, profile: Profile, by_layer: bool) -> None:
    """Prints what was found: by op (or by rung), by layer where there are layers, kernels, ceilings and messages."""
    where = "counted, not computed" if profile.device == "counting" else f"on {profile.device}"
    console.print(f"{profile.title}, {where}", style="bold", soft_wrap=True)
    total = profile.total
    counts = ["launches"] * (total.launches > 0) + ["barriers"] * (total.barriers > 0)
    timed = total.seconds is not None
    times = ["bytes' ms", "ms", "share", "GFLOP/s", "GB/s", "of copy", "of ceiling"] if timed else []
    columns = [*counts, "GFLOP", "MB", "FLOP/B", *times]
    if by_layer:
        ops = sorted(profile.by(lambda run: run.name), key=_longest_first)
        _print(console, _sums(profile, ops, "op", ["runs", *columns], total))
        layers = profile.by(lambda run: run.layer)
        halves = ["bytes' ms", "forward ms", "backward ms", "share", "of ceiling"] if timed else []
        _print(console, _sums(profile, layers, "layer", ["GFLOP", "MB", *halves]))
        if timed:
            each = sorted((Summary(run.name, (run,)) for run in profile.runs), key=_longest_first)[:SLOWEST]
            _print(console, _sums(profile, each, "slowest ops", ["layer", "phase", "GFLOP", "MB", *times]))
    else:
        rungs = profile.by(lambda run: run.layer)  # in the order of the ladder
        _print(console, _sums(profile, rungs, "op and rung", ["passes" if timed else "runs", *columns]))
    if profile.kernels:
        _print(console, _kernels(profile.kernels))
    for line in _footnotes(profile):
        console.print(line, style="dim", soft_wrap=True)
    for message in profile.messages:
        console.print(message, style="yellow", soft_wrap=True)


def _longest_first(summary: Summary) -> float:
    return -(summary.seconds or summary.flops)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    return table


def _sums(
    profile: Profile, summaries: Sequence[Summary], first: str, columns: Sequence[str], total: Summary | None = None
) -> Table:
    table = _table(first, *("runs" if column == "passes" else column for column in columns))
    for summary in summaries:
        table.add_row(summary.key, *(_cell(summary, column, profile) for column in columns))
    if total is not None:
        table.add_section()
        table.add_row(total.key, *(_cell(total, column, profile) for column in columns), style="bold")
    return table


def _cell(s: Summary, column: str, profile: Profile) -> str:
    """What stands in a column of this name."""
    seconds, reached = s.seconds or 0.0, s.of_ceiling(profile.ceilings)
    of_bytes = s.seconds_of_bytes(profile.ceilings) or 0.0
    forward = Summary("", tuple(run for run in s.runs if run.phase == "forward")).seconds or 0.0
    return {
        "runs": lambda: str(len(s.runs)),
        "passes": lambda: str(max(len(run.times) for run in s.runs)),
        "layer": lambda: s.runs[0].layer,
        "phase": lambda: s.runs[0].phase,
        "launches": lambda: str(s.launches),
        "barriers": lambda: str(s.barriers),
        "GFLOP": lambda: f"{s.flops / 1e9:.3f}",
        "MB": lambda: f"{s.bytes / 1e6:.1f}",
        "FLOP/B": lambda: f"{s.intensity:.2f}",
        "bytes' ms": lambda: f"{1e3 * of_bytes:.3f}",
        "ms": lambda: f"{1e3 * seconds:.3f}",
        "forward ms": lambda: f"{1e3 * forward:.3f}",
        "backward ms": lambda: f"{1e3 * (seconds - forward):.3f}",  # everything after it
        "share": lambda: f"{100 * seconds / (profile.total.seconds or 1.0):.1f} %",
        "GFLOP/s": lambda: f"{s.flops / seconds / 1e9:.1f}" if seconds else "-",
        "GB/s": lambda: f"{s.bytes / seconds / 1e9:.1f}" if seconds else "-",
        "of copy": lambda: f"{100 * of_bytes / seconds:.0f} %" if seconds else "-",
        "of ceiling": lambda: "-" if reached is None else f"{100 * reached:.0f} %",
    }[column]()


def _kernels(kernels: Sequence[KernelFigures]) -> Table:
    table = _table("kernel", "GPU", "launches", "threads", "registers", "spills", "shared", "occupancy", "limited by")
    for figures in kernels:
        usage, held = figures.usage, figures.occupancy
        spills = usage.spill_stores + usage.spill_loads
        table.add_row(
            *(usage.kernel, usage.architecture, str(figures.launches), str(figures.threads), str(usage.registers)),
            *(str(spills), str(usage.shared + figures.dynamic_shared), f"{100 * held.share:.0f} %", held.limit),
            style="red" if spills else "",
        )
    return table


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
