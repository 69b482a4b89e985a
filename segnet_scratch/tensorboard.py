"""TensorBoard's event files of a run, beside metrics.jsonl, by tensorboardX (the extra `tensorboard`)."""

import importlib
import logging
import math
from collections.abc import Callable
from time import time
from typing import Any

from segnet_scratch.evaluate import Evaluation
from segnet_scratch.extras import require
from segnet_scratch.files import reason
from segnet_scratch.train import Listener, Trainer

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
"""Name of the folder of event files in a run folder."""


class TensorBoard(Listener):
    """Writes loss and learning rate of each step and the scores of each validation; closes its file at the end.

    A fault of the file, such as a full disk, ends the writing with a warning, and not the run.

    Look at it with `tensorboard --logdir RUN`. A resumed run goes on in the same curves: TensorBoard drops what was
    logged past the step from which it was resumed. MissingLibraryError where tensorboardX is missing.
    """

    def __init__(self) -> None:
        require("tensorboardX", "tensorboard", "--tensorboard")
        self._files, self._summary, self._events = (
            importlib.import_module(f"tensorboardX.{name}")
            for name in ("event_file_writer", "summary", "proto.event_pb2")
        )
        self._writer: Any = None

    def started(self, trainer: Trainer) -> None:
        folder = trainer.folder.path / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The writer below tensorboardX's own, whose thread a fault ends: then its queue fills up, and all waits.
            # Files are named by the second; a run resumed within the same one must not write over its beginning.
            self._writer = self._files.EventsWriter(str(folder / "events"), f".{trainer.step}")
        except OSError as error:
            self._end(error)
        began = self._events.Event(wall_time=time(), step=trainer.step + 1)
        began.session_log.status = self._events.SessionLog.START  # what was logged from this step on is dropped
        self._attempt(lambda writer: writer.write_event(began))

    def stepped(self, trainer: Trainer, loss: float, lr: float) -> None:
        self._add("loss/training", loss, trainer.step)
        self._add("learning_rate", lr, trainer.step)

    def validated(self, trainer: Trainer, evaluation: Evaluation) -> None:
        scores = evaluation.scores
        self._add("loss/validation", evaluation.loss, trainer.step)
        self._add("mean_IoU", scores.miou, trainer.step)
        self._add("accuracy/global", scores.global_accuracy, trainer.step)
        self._add("accuracy/class", scores.class_accuracy, trainer.step)
        for name, iou in zip(evaluation.names, scores.iou.tolist(), strict=True):
            self._add(f"IoU/{name}", iou, trainer.step)
        self._attempt(lambda writer: writer.flush())

    def ended(self, trainer: Trainer) -> None:
        self._attempt(lambda writer: writer.close())

    def _add(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):  # NaN: a class that does not occur
            summary = self._summary.scalar(name, value)
            event = self._events.Event(wall_time=time(), step=step, summary=summary)
            self._attempt(lambda writer: writer.write_event(event))

    def _attempt(self, act: Callable[[Any], object]) -> None:
        if self._writer is not None:
            try:
                act(self._writer)
            except (OSError, ValueError) as error:  # ValueError: of a file that is closed
                self._end(error)

    def _end(self, error: Exception) -> None:
        self._writer = None
        why = reason(error) if isinstance(error, OSError) else error
        log.warning("%s: %s; the run goes on without", FOLDER, why)
