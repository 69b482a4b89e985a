"""A profile as tables for a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from segnet_scratch.lab.profile.kernels import KernelFigures
from segnet_scratch.lab.profile.summary import Profile, Summary

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
    if by_layer:
        _print(console, _sums("op", profile.by(lambda run: run.name), profile))
        _print(console, _layers(profile))
        if profile.total.seconds is not None:
            _print(console, _slowest(profile))
    else:
        _print(console, _sums("op and rung", profile.by(lambda run: run.layer), profile, total=False))
    if profile.kernels:
        _print(console, _kernels(profile.kernels))
    for line in _footnotes(profile):
        console.print(line, style="dim", soft_wrap=True)
    for message in profile.messages:
        console.print(message, style="yellow", soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    return table


def _sums(first: str, summaries: Sequence[Summary], profile: Profile, total: bool = True) -> Table:
    timed, host = profile.total.seconds is not None, profile.total.barriers > 0
    table = _table(
        *(first, "runs"),
        *(("launches",) if profile.total.launches else ()),
        *(("barriers",) if host else ()),
        *("GFLOP", "MB", "FLOP/B"),
        *(("ms", "share", "GFLOP/s", "GB/s", "of ceiling") if timed else ()),
    )

    def add(summary: Summary, style: str = "") -> None:
        runs = max(len(run.times) for run in summary.runs) if not total and timed else len(summary.runs)
        table.add_row(
            *(summary.key, str(runs)),
            *((str(summary.launches),) if profile.total.launches else ()),
            *((f"{summary.barriers}",) if host else ()),
            *(f"{summary.flops / 1e9:.3f}", f"{summary.bytes / 1e6:.1f}", f"{summary.intensity:.2f}"),
            *_times(summary, profile),
            style=style,
        )

    # In a step what takes longest stands first; rungs stand in the order of the ladder.
    ordered = sorted(summaries, key=lambda s: -(s.seconds or s.flops)) if total else summaries
    for summary in ordered:
        add(summary)
    if total:
        table.add_section()
        add(profile.total, "bold")
    return table


def _times(summary: Summary, profile: Profile) -> list[str]:
    seconds, whole = summary.seconds, profile.total.seconds
    if seconds is None or not whole:
        return []
    reached = summary.of_ceiling(profile.ceilings)
    return [
        *(f"{1e3 * seconds:.3f}", f"{100 * seconds / whole:.1f} %"),
        *(f"{summary.flops / seconds / 1e9:.1f}", f"{summary.bytes / seconds / 1e9:.1f}"),
        "-" if reached is None else f"{100 * reached:.0f} %",
    ]


def _layers(profile: Profile) -> Table:
    """Forward and everything after it side by side."""
    timed = profile.total.seconds is not None
    table = _table("layer", "GFLOP", "MB", *(("forward ms", "backward ms", "share", "of ceiling") if timed else ()))
    for layer in profile.by(lambda run: run.layer):
        cells = [layer.key, f"{layer.flops / 1e9:.3f}", f"{layer.bytes / 1e6:.1f}"]
        if timed:
            forward = Summary("", tuple(run for run in layer.runs if run.phase == "forward")).seconds or 0.0
            seconds, whole = layer.seconds or 0.0, profile.total.seconds or 1.0
            reached = layer.of_ceiling(profile.ceilings)
            cells += [f"{1e3 * forward:.3f}", f"{1e3 * (seconds - forward):.3f}", f"{100 * seconds / whole:.1f} %"]
            cells.append("-" if reached is None else f"{100 * reached:.0f} %")
        table.add_row(*cells)
    return table


def _slowest(profile: Profile) -> Table:
    """The ops that take longest, each at its place: what must move at least beside what it takes."""
    table = _table("slowest ops", "layer", "phase", "GFLOP", "MB", "ms", "share", "GFLOP/s", "GB/s", "of ceiling")
    for run in sorted(profile.runs, key=lambda run: -(run.seconds or 0.0))[:SLOWEST]:
        one = Summary(run.name, (run,))
        work = f"{run.flops / 1e9:.3f}", f"{run.bytes / 1e6:.1f}"
        table.add_row(run.name, run.layer, run.phase, *work, *_times(one, profile))
    return table


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
        lines.append("FLOP, MB: by the definition of each op; ms: medians; of ceiling: shortest possible time / time")
    if profile.device == "numpy":
        lines.append("above 100 %: Winograd's convolution multiplies less than the definition, and caches save traffic")
    if profile.parameters:
        memory = [f"{name} {nbytes / 1e6:.1f} MB" for name, nbytes in profile.memory.items()]
        lines.append(", ".join([f"{profile.parameters:,} parameters", *memory]))
    return lines
