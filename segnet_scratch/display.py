"""What the commands show: live training progress, tables of scores, JSON results."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from segnet_scratch.checkpoint import write_durably
from segnet_scratch.evaluate import Evaluation
from segnet_scratch.train import Listener, Throughput, Trainer

_SECONDS_BETWEEN_LINES = 10.0  # where the output is no terminal


def write_json(path: Path | None, result: Any) -> None:
    """Writes a result for programs to read, whole or not at all; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, [json.dumps(result, indent=2, allow_nan=False).encode() + b"\n"])


def scores_table(evaluation: Evaluation) -> Table:
    """Per-class IoU, and the three averages."""
    table = Table(title=f"{evaluation.images} images")
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, iou in zip(evaluation.names, evaluation.scores.iou, strict=True):
        table.add_row(name, "-" if math.isnan(iou) else f"{100 * iou:.1f}")
    table.add_section()
    for name, value in (
        ("mean IoU", evaluation.scores.miou),
        ("global accuracy", evaluation.scores.global_accuracy),
        ("class accuracy", evaluation.scores.class_accuracy),
    ):
        table.add_row(name, f"{100 * value:.1f}", style="bold")
    return table


def _progress(console: Console, transient: bool = False) -> Progress:
    # In a narrow terminal the bar gives way, not the numbers.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


@contextmanager
def evaluation_progress(console: Console, images: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in a terminal, nothing elsewhere; gives a function that is told of so many images more."""
    with _progress(console, transient=True) as progress:
        task = progress.add_task("evaluate", total=images, status="")
        yield lambda done: progress.advance(task, done)


class TrainingDisplay(Listener):
    """A progress bar with loss, learning rate, images per second and time left; plain lines without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = _progress(console)
        self._last_line = perf_counter()

    def __enter__(self) -> "TrainingDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _say(self, text: str) -> None:
        # Lines for a file or another program are not broken; a bar in a terminal needs its lines cut to the width.
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    def started(self, trainer: Trainer) -> None:
        sets = f"{len(trainer.train_set)} training and {len(trainer.val_set)} validation images"
        size = "x".join(map(str, trainer.config.image_size))
        self._say(
            f"{trainer.config.model} (width {trainer.config.width:g}) on {trainer.model.device.name}, {sets}, "
            f"{trainer.train_set.classes} classes, {size} pixels, {trainer.initialised}"
        )
        self._task = self._progress.add_task("train", total=trainer.total_steps, completed=trainer.step, status="")
        self._throughput = Throughput(trainer.loader)
        self._validating = self._progress.add_task("validate", total=len(trainer.val_set), status="", visible=False)

    def stepped(self, trainer: Trainer, loss: float, lr: float) -> None:
        self._throughput.tick()
        rate = trainer.config.batch / self._throughput.seconds_per_step
        status = f"loss {loss:.4f}  lr {lr:.2g}  {rate:.1f} images/s  waiting {100 * self._throughput.waiting:.0f}%"
        self._progress.update(self._task, completed=trainer.step, status=status)
        finished = trainer.step == trainer.total_steps
        if not self._console.is_terminal and (finished or perf_counter() - self._last_line > _SECONDS_BETWEEN_LINES):
            self._last_line = perf_counter()
            left = (trainer.total_steps - trainer.step) * self._throughput.seconds_per_step
            self._say(f"step {trainer.step}/{trainer.total_steps}  {status}  {left:.0f} s left")

    def validating(self, images: int) -> None:
        self._progress.update(self._validating, advance=images, visible=True)

    def validated(self, trainer: Trainer, evaluation: Evaluation) -> None:
        self._progress.update(self._validating, completed=0, visible=False)
        best = " (best)" if trainer.best_miou == evaluation.scores.miou else ""
        self._say(
            f"step {trainer.step}: validation loss {evaluation.loss:.4f}, mIoU {100 * evaluation.scores.miou:.1f} %, "
            f"global accuracy {100 * evaluation.scores.global_accuracy:.1f} %{best}"
        )
        self._throughput = Throughput(trainer.loader)  # validation is no part of the training rate
