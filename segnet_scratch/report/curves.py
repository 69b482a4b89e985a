"""The curves of a run as SVG, drawn by matplotlib (the extra `report`)."""

import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import require

_POINTS = 1000  # of a curve, at most; more than a page is pixels wide would only make the file large
_RAW, _SMOOTH, _OTHER = "#b9cdea", "#1f5fbf", "#d1622b"
Rows = Sequence[dict[str, Any]]  # of the log of a run

_STYLE = Path(__file__).with_name("curves.mplstyle")


def series(rows: Rows, key: str, unit: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Steps, in so many each, and values of the rows of a log that have a key: float64 (n,); null there means NaN."""
    steps, values = np.array([(row["step"], row[key]) for row in rows if key in row], float).reshape(-1, 2).T
    return steps / unit, values


def draw_curves(rows: Rows, steps_per_epoch: int | None) -> dict[str, str | None]:
    """<svg> elements `loss_svg`, `miou_svg` and `rate_svg` of the rows of a log; None where there is nothing to draw.

    The horizontal axis has steps, or epochs where it is known how many steps one has.
    """
    unit, label = steps_per_epoch or 1, "epoch" if steps_per_epoch else "step"
    with require("matplotlib", "report", "the report").rc_context(fname=_STYLE):
        return {
            "loss_svg": _loss_curve(rows, unit, label),
            "miou_svg": _miou_curve(rows, unit, label),
            "rate_svg": _rate_curve(rows, unit, label),
        }


def smooth(values: np.ndarray, span: int) -> np.ndarray:
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


def _loss_curve(rows: Rows, unit: int, label: str) -> str | None:
    """Training loss, raw and smoothed, and validation loss."""
    (x, losses), validation = series(rows, "loss", unit), series(rows, "val_loss", unit)
    if not len(x):
        return None
    axes, span = _axes(label, "loss", (9.6, 3.3)), max(5, len(x) // 40)
    axes.plot(*thinned(x, losses), color=_RAW, linewidth=0.8, label="training, each step")
    axes.plot(*thinned(x, smooth(losses, span)), color=_SMOOTH, linewidth=1.8, label=f"training, over {span} steps")
    if len(validation[0]):
        axes.plot(*validation, "o-", color=_OTHER, linewidth=1.2, markersize=4, label="validation")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    return _svg(axes, "Loss of training and validation")


def _miou_curve(rows: Rows, unit: int, label: str) -> str | None:
    """mIoU of every validation, in percent, the best one marked."""
    x, mious = series([row for row in rows if row.get("miou") is not None], "miou", unit)
    if not len(x):
        return None
    axes, values, best = _axes(label, "mIoU %", (4.7, 2.9)), 100 * mious, int(mious.argmax())
    axes.plot(x, values, "o-", color=_SMOOTH, linewidth=1.8, markersize=4)
    axes.plot(x[best], values[best], "o", color=_OTHER, markersize=7)
    place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "right" if best else "left", "color": _OTHER}
    axes.annotate(f"{values[best]:.1f}", (x[best], values[best]), **place)
    axes.set_ylim(0, max(5, 1.2 * values[best]))
    return _svg(axes, "Mean IoU of every validation")


def _rate_curve(rows: Rows, unit: int, label: str) -> str | None:
    """Learning rate of every step."""
    x, rates = series(rows, "lr", unit)
    if not len(x):
        return None
    axes = _axes(label, "learning rate", (4.7, 2.9))
    axes.plot(*thinned(x, rates), color=_SMOOTH, linewidth=1.8)
    axes.set_ylim(bottom=0, top=1.1 * rates.max())
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    return _svg(axes, "Learning rate of every step")


def _axes(label: str, what: str, inches: tuple[float, float]) -> Any:
    figure = require("matplotlib.figure", "report", "the report").Figure(figsize=inches, layout="constrained")
    return figure.add_subplot(xlabel=label, ylabel=what)


def _svg(axes: Any, title: str) -> str:
    """An <svg> element for a page."""
    axes.set_xlim(left=0)
    text = StringIO()
    axes.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
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
