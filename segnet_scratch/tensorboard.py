"""TensorBoard's event files of a run, beside metrics.jsonl, by tensorboardX (the extra `tensorboard`)."""

import importlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import time
from typing import Any

from segnet_scratch.errors import require
from segnet_scratch.evaluate import Evaluation
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
        names = ("event_file_writer", "summary", "proto.event_pb2")
        self._files, self._summary, self._events = (importlib.import_module(f"tensorboardX.{name}") for name in names)
        self._writer: Any = None

    def started(self, trainer: Trainer) -> None:
        folder = trainer.folder.path / FOLDER
        began = self._events.Event(wall_time=time(), step=trainer.step + 1)
        began.session_log.status = self._events.SessionLog.START  # what was logged from this step on is dropped
        with self._guarded():
            folder.mkdir(parents=True, exist_ok=True)
            # The writer below tensorboardX's own, whose thread a fault ends: then its queue fills up, and all waits.
            # Files are named by the second; a run resumed within the same one must not write over its beginning.
            self._writer = self._files.EventsWriter(str(folder / "events"), f".{trainer.step}")
            self._writer.write_event(began)

    def stepped(self, trainer: Trainer, loss: float, lr: float) -> None:
        self._add(trainer.step, {"loss/training": loss, "learning_rate": lr})

    def validated(self, trainer: Trainer, evaluation: Evaluation) -> None:
        scores = evaluation.scores
        found = {"loss/validation": evaluation.loss, "mean_IoU": scores.miou}
        found |= {"accuracy/global": scores.global_accuracy, "accuracy/class": scores.class_accuracy}
        found |= {f"IoU/{name}": iou for name, iou in zip(evaluation.names, scores.iou.tolist(), strict=True)}
        self._add(trainer.step, found, flush=True)

    def ended(self, trainer: Trainer) -> None:
        if self._writer is not None:
            with self._guarded():
                self._writer.close()

    def _add(self, step: int, values: Mapping[str, float], flush: bool = False) -> None:
        if self._writer is not None:
            with self._guarded():
                for name, value in values.items():
                    if math.isfinite(value):  # NaN: a class that does not occur
                        summary = self._summary.scalar(name, value)
                        self._writer.write_event(self._events.Event(wall_time=time(), step=step, summary=summary))
                if flush:
                    self._writer.flush()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: of a file that is closed
            self._writer, why = None, reason(error) if isinstance(error, OSError) else error
            log.warning("%s: %s; the run goes on without", FOLDER, why)
