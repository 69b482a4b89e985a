"""The curves of a run as SVG, drawn by matplotlib (the extra `report`)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from segnet_scratch.extras import require

_POINTS = 1000  # of a curve, at most; more than a page is pixels wide would only make the file large
_RAW, _SMOOTH, _OTHER = "#b9cdea", "#1f5fbf", "#d1622b"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, to be searched and read aloud
    "svg.hashsalt": "segnet",  # the same run gives the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: steps, or epochs where it is known how many steps one has."""

    steps_per_epoch: int | None

    @property
    def label(self) -> str:
        """What it shows."""
        return "step" if self.steps_per_epoch is None else "epoch"

    def of(self, steps: Sequence[int]) -> np.ndarray:
        """Steps as positions on the axis."""
        return np.asarray(steps, float) / (self.steps_per_epoch or 1)


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """Exponential moving average of so many steps, without the pull of a start value: float64 of the same length.

    s_k = sum_j d^j v_(k-j) / sum_j d^j over the steps so far, d = 1 - 2 / (span + 1). NaN stays where it stood and
    counts for nothing.
    """
    decay = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, np.full(len(values), np.nan)
    for k, value in enumerate(values):
        total, weight = decay * total, decay * weight
        if np.isfinite(value):
            total, weight = total + value, weight + 1
            result[k] = total / weight
    return result


def thinned(x: np.ndarray, y: np.ndarray, points: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve with at most about so many points that keeps the smallest and largest of each stretch: peaks stay."""
    if len(x) <= points:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), points // 2):
        if np.isfinite(y[stretch]).any():
            kept += sorted({int(stretch[np.nanargmin(y[stretch])]), int(stretch[np.nanargmax(y[stretch])])})
    return x[kept], y[kept]


def loss_curve(
    steps: Sequence[int], losses: Sequence[float], validation: Sequence[tuple[int, float]], span: int, axis: Axis
) -> str:
    """Training loss, raw and smoothed over `span` steps, and validation loss."""

    def draw(axes: Any) -> None:
        raw = np.asarray(losses, float)
        axes.plot(*thinned(axis.of(steps), raw), color=_RAW, linewidth=0.8, label="training, each step")
        smoothed = smooth(losses, span)
        axes.plot(
            *thinned(axis.of(steps), smoothed), color=_SMOOTH, linewidth=1.8, label=f"training, over {span} steps"
        )
        if validation:
            validated, values = zip(*validation, strict=True)
            axes.plot(axis.of(validated), values, "o-", color=_OTHER, linewidth=1.2, markersize=4, label="validation")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

    return _svg(draw, "loss", axis, "Loss of training and validation", (9.6, 3.3))


def miou_curve(validations: Sequence[tuple[int, float]], axis: Axis) -> str:
    """mIoU of every validation, in percent, the best one marked."""

    def draw(axes: Any) -> None:
        at, values = axis.of([step for step, _ in validations]), 100 * np.array([miou for _, miou in validations])
        axes.plot(at, values, "o-", color=_SMOOTH, linewidth=1.8, markersize=4)
        best = int(np.nanargmax(values))
        axes.plot(at[best], values[best], "o", color=_OTHER, markersize=7)
        place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "right" if best else "left", "color": _OTHER}
        axes.annotate(f"{values[best]:.1f}", (at[best], values[best]), **place)
        axes.set_ylim(0, max(5, 1.2 * np.nanmax(values)))

    return _svg(draw, "mIoU %", axis, "Mean IoU of every validation", (4.7, 2.9))


def rate_curve(steps: Sequence[int], rates: Sequence[float], axis: Axis) -> str:
    """Learning rate of every step."""

    def draw(axes: Any) -> None:
        axes.plot(*thinned(axis.of(steps), np.asarray(rates, float)), color=_SMOOTH, linewidth=1.8)
        axes.set_ylim(bottom=0, top=1.1 * max(rates))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))

    return _svg(draw, "learning rate", axis, "Learning rate of every step", (4.7, 2.9))


def _svg(draw: Callable[[Any], None], what: str, axis: Axis, title: str, inches: tuple[float, float]) -> str:
    """An <svg> element for a page."""
    matplotlib = require("matplotlib", "report", "the report")
    figures = require("matplotlib.figure", "report", "the report")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(axis.label)
        axes.set_ylabel(what)
        axes.set_xlim(left=0)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), title)


def _inline(file: str, title: str) -> str:
    """The <svg> element of an SVG file as a page takes it: sized by the page, named for those who do not see it."""
    box = re.search(r'viewBox="[^"]*"', file)
    body = file[file.index(">", file.index("<svg")) + 1 :]
    # The style sheet would hold for the whole page; ids must differ between the drawings of one page.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    prefix = title.lower().replace(" ", "-")
    body = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}-", body)
    return f'<svg role="img" aria-label="{title}" {box[0] if box else ""}>{body}'
