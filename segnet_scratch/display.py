"""What the commands show: live training progress, tables of scores, JSON results."""

import csv
import json
import math
from collections import deque
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from segnet_scratch.data import VOC_CLASSES, Loader
from segnet_scratch.errors import printable
from segnet_scratch.evaluate import Evaluation
from segnet_scratch.files import write_durably
from segnet_scratch.metrics import plain
from segnet_scratch.progress import SECONDS_BETWEEN_LINES, Watch, bar, remaining
from segnet_scratch.train import Listener, Trainer

_WIDE = 100  # columns of a terminal with room for everything that is said of a step


def write_json(path: Path | None, result: Any) -> None:
    """Writes a result for programs to read, whole or not at all; nothing where no path is given."""
    if path is not None:
        _write(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def write_per_image(path: Path | None, evaluation: Evaluation) -> None:
    """Writes one row per image as CSV: id, fractions as in JSON, empty where there is none; nothing without a path."""
    columns = ["id", "miou", "global_accuracy", "pixels"]
    columns += [] if evaluation.boundary_f1 is None else ["boundary_f1"]
    text = StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(asdict(image)) for image in evaluation.per_image)
    _write(path, text.getvalue())


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, [text.encode()])


def numbers_table(name: str, *headings: str, first: str = "") -> Table:
    """A table with a column of names, of which long ones are folded, and columns of numbers, which are never cut."""
    leading, *numbers = (Column(heading, justify="right", no_wrap=True) for heading in (first, *headings))
    columns = [*([leading] if first else []), Column(name, overflow="fold"), *numbers]
    return Table(*columns, box=SIMPLE, pad_edge=False)


def scores_table(evaluation: Evaluation) -> Table:
    """IoU, accuracy and precision of every class and its share of the pixels, and the averages."""
    scores = evaluation.scores
    table = numbers_table("class", "IoU %", "accuracy %", "precision %", "pixels %")
    table.title = f"{evaluation.images} images, {scores.pixels:,} pixels"
    shares = scores.class_pixels / max(1, scores.pixels)
    for name, *fractions in zip(evaluation.names, scores.iou, scores.accuracy, scores.precision, shares, strict=True):
        table.add_row(name, *map(_percent, fractions))
    table.add_section()
    table.add_row("mean IoU", _percent(scores.miou), style="bold")
    table.add_row("class accuracy", "", _percent(scores.class_accuracy), style="bold")
    table.add_row("global accuracy", "", _percent(scores.global_accuracy), style="bold")
    if evaluation.boundary_f1 is not None:
        table.add_row("boundary F1", _percent(evaluation.boundary_f1), style="bold")
    return table


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f}"


class TrainingDisplay(Listener):
    """A progress bar with loss, learning rate, images per second and time left; plain lines without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = bar(console, transient=False, left=False)
        self._last_line = perf_counter()

    def _say(self, text: str) -> None:
        # Lines for a file or another program are not broken; a bar in a terminal needs its lines cut to the width.
        self._console.print(printable(text), soft_wrap=not self._console.is_terminal)

    def started(self, trainer: Trainer) -> None:
        scored = 0 if trainer.val_set is None else len(trainer.val_set)
        sets = f"{len(trainer.train_set)} training and {scored or 'no'} validation images"
        size = "x".join(map(str, trainer.config.image_size))
        whose = "VOC's " if trainer.train_set.names == VOC_CLASSES else ""
        self._say(
            f"{trainer.config.model} (width {trainer.config.width:g}) on {trainer.model.device.name}, {sets}, "
            f"{whose}{trainer.train_set.classes} classes, {size} pixels, {trainer.initialised}, "
            f"{trainer.config.engine} engine in {trainer.config.precision}"
        )
        if trainer.ranks.size > 1:
            self._say(f"{trainer.ranks.size} ranks: {', '.join(trainer.ranks.members)}")
        self._task = self._progress.add_task("train", total=trainer.total_steps, completed=trainer.step, status="")
        self._throughput = _Throughput(trainer.loader)
        self._scored = scored
        self._watch: Watch | None = None
        self._progress.start()  # last: what fails before it leaves the terminal as it was

    def stepped(self, trainer: Trainer, loss: float, lr: float) -> None:
        each, waited = self._throughput.tick()
        left = remaining((trainer.total_steps - trainer.step) * each)
        if self._console.is_terminal and self._console.width < _WIDE:
            parts = [f"loss {loss:.4f} lr {lr:.2g} {trainer.config.batch / each:.1f}/s", left]
        else:
            waiting = f"waiting {100 * waited:.0f}%"
            parts = [f"loss {loss:.4f}", f"lr {lr:.2g}", f"{trainer.config.batch / each:.1f} images/s", waiting, left]
        status = "  ".join(part for part in parts if part and "nan" not in part)
        self._progress.update(self._task, completed=trainer.step, status=status)
        finished = trainer.step == trainer.total_steps
        if not self._console.is_terminal and (finished or perf_counter() - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = perf_counter()
            self._say(f"step {trainer.step}/{trainer.total_steps}  {status}")

    def compiling(self, done: int, total: int) -> None:
        self._beside("compile", total).update(done, total)
        if done == total:
            self._resume()

    def validating(self, images: int) -> None:
        self._beside("validate", self._scored).advance(images)

    def _beside(self, what: str, total: int) -> Watch:
        """The bar of what is no training."""
        if self._watch is None:
            self._throughput.pause()
            self._watch = Watch(self._console, self._progress, what, total)
        return self._watch

    def _resume(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def validated(self, trainer: Trainer, evaluation: Evaluation) -> None:
        self._resume()
        best = " (best)" if trainer.best_miou == evaluation.scores.miou else ""
        self._say(
            f"step {trainer.step}: validation loss {evaluation.loss:.4f}, mIoU {100 * evaluation.scores.miou:.1f} %, "
            f"global accuracy {100 * evaluation.scores.global_accuracy:.1f} %{best}"
        )

    def ended(self, trainer: Trainer) -> None:
        self._progress.stop()


class _Throughput:
    """Seconds a step over the last ones, and the share of them spent waiting for data."""

    def __init__(self, loader: Loader, window: int = 20) -> None:
        self._loader = loader
        self._spans: deque[np.ndarray] = deque(maxlen=window)  # of each step: seconds, and those waited for data
        self.pause()

    def pause(self) -> None:
        """What comes now is no training, to the end of the next step: a validation, a checkpoint, compiling."""
        self._last: np.ndarray | None = None

    def tick(self) -> tuple[float, float]:
        """A step has ended: seconds a step, NaN before the second one, and the share of them waited for data."""
        now = np.array([perf_counter(), self._loader.waited])
        if self._last is not None:
            self._spans.append(now - self._last)
        self._last = now
        seconds, waited = np.mean(self._spans, axis=0) if self._spans else (math.nan, 0.0)
        return float(seconds), float(waited / seconds)
