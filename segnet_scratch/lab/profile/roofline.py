"""The roofline as a picture: what each op reaches over its arithmetic intensity, below the ceilings of this machine.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009).
"""

from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np

from segnet_scratch.errors import ConfigError, require
from segnet_scratch.files import write_durably
from segnet_scratch.lab.profile.record import Profile

LARGEST, SMALLEST = 260, 14  # areas of points, in square points of print


def load() -> ModuleType:
    """matplotlib.figure; MissingLibraryError without it, before minutes are spent on measuring."""
    return require("matplotlib.figure", "profile", "--roofline")


def draw(profile: Profile, path: Path, by_layer: bool) -> None:
    """Writes the picture as PNG: a point for each op of each layer, a colour for each op (or each rung).

    ConfigError without times or without any op that computes.
    """
    each = profile.each(lambda run: run.name if by_layer else run.layer)
    points = [s for s in each if s.flops and s.gflops_per_second]
    ceilings = profile.ceilings
    if ceilings is None or not points:
        raise ConfigError("--roofline: no op with operations and a time; leave out --counts, choose another op")
    figure = load().Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot()
    left, right = min(s.intensity for s in points) / 2, max(s.intensity for s in points) * 2
    roof = max(ceilings.flops_of(s.runs[0].multiply) for s in points)
    ridge = roof / ceilings.bandwidth
    x = np.array([min(left, ridge / 4), ridge, max(right, ridge * 4)])
    axes.plot(x, np.minimum(roof, x * ceilings.bandwidth) / 1e9, color="black", linewidth=1.5)
    flops, bandwidth = f"{roof / 1e9:,.0f} GFLOP/s", f"{ceilings.bandwidth / 1e9:,.0f} GB/s"
    axes.annotate(flops, (ridge, roof / 1e9), (4, 5), textcoords="offset points")
    at = float(np.sqrt(x[0] * ridge))
    axes.annotate(bandwidth, (at, at * ceilings.bandwidth / 1e9), (-8, 6), textcoords="offset points", ha="right")
    whole, longest = sum(s.seconds or 0.0 for s in points), max(s.seconds or 0.0 for s in points)
    kinds = sorted({s.key for s in points}, key=lambda kind: -sum(s.seconds or 0.0 for s in points if s.key == kind))
    for position, kind in enumerate(kinds):
        chosen = [s for s in points if s.key == kind]
        times = np.array([s.seconds for s in chosen])
        axes.scatter(
            [s.intensity for s in chosen],
            [s.gflops_per_second for s in chosen],
            s=np.maximum(LARGEST * times / longest, SMALLEST),
            color=f"C{position % 10}",
            marker="o" if position < 10 else "s",
            alpha=0.75,
            edgecolors="white",
            linewidths=0.5,
            label=f"{kind} ({100 * times.sum() / whole:.1f} %)",
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
    axes.set_title(f"{profile.title}, {profile.device}", fontsize=10)
    axes.grid(which="major", alpha=0.3)
    legend = axes.legend(fontsize=8, loc="lower right", title="share of the time (area: of each)", title_fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, [picture.getvalue()])
