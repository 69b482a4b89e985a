"""TensorBoard's event files of a run, beside metrics.jsonl, by tensorboardX (the extra `tensorboard`)."""

import math
from typing import Any

from segnet_scratch.evaluate import Evaluation
from segnet_scratch.extras import require
from segnet_scratch.train import Listener, Trainer

FOLDER = "tensorboard"
"""Name of the folder of event files in a run folder."""


class TensorBoard(Listener):
    """Writes loss and learning rate of each step and the scores of each validation; closes its file on exit.

    Look at it with `tensorboard --logdir RUN`. A resumed run goes on in the same curves: TensorBoard drops what was
    logged past the step from which it was resumed. MissingLibraryError where tensorboardX is missing.
    """

    def __init__(self) -> None:
        self._library = require("tensorboardX", "tensorboard", "--tensorboard")
        self._writer: Any = None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def started(self, trainer: Trainer) -> None:
        folder = trainer.folder.path / FOLDER
        # Files are named by the second; a run resumed within the same one must not write over its beginning.
        suffix = f".{trainer.step}"
        self._writer = self._library.SummaryWriter(str(folder), purge_step=trainer.step + 1, filename_suffix=suffix)

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
        self._writer.flush()

    def _add(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):  # NaN: a class that does not occur
            self._writer.add_scalar(name, value, step)
