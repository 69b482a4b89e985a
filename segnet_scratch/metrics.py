"""Scores of a segmentation from its confusion matrix, and the log of a run's figures (metrics.jsonl).

All scores are fractions, not percentages. A score whose denominator is 0 is NaN in memory and null in JSON.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import DataError, TrainingError
from segnet_scratch.files import reason, write_durably


@dataclass(frozen=True)
class Scores:
    """The scores of one confusion matrix of K classes. docs/reference/metrics.md works a case by hand.

    iou: (K,) float64, TP / (TP + FP + FN) of each class; NaN for a class that occurs neither in the ground
        truth nor in the prediction. A class that is predicted but never true scores 0, as in the VOC
        development kit.
    miou: the mean over the classes that are not NaN. The development kit (VOCevalseg.m) averages all classes,
        so one absent class makes its mean NaN; on a whole VOC split every class occurs and the two agree.
    global_accuracy: the fraction of pixels that are predicted right.
    class_accuracy: the mean of `accuracy` over the classes that occur in the ground truth.
    accuracy: (K,) float64, TP / (TP + FN): the share of a class's pixels that was found; NaN where it has none.
    precision: (K,) float64, TP / (TP + FP): the share of a class's predictions that is right; NaN without any.
    confusion: (K, K) int64, the matrix itself: rows the ground truth, columns the prediction.
    """

    iou: np.ndarray
    miou: float
    global_accuracy: float
    class_accuracy: float
    accuracy: np.ndarray
    precision: np.ndarray
    confusion: np.ndarray

    @property
    def class_pixels(self) -> np.ndarray:
        """The pixels of each class in the ground truth: (K,) int64."""
        return self.confusion.sum(axis=1)

    @property
    def pixels(self) -> int:
        """The number of pixels scored, void left out."""
        return int(self.confusion.sum())

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """The scores as a JSON object: numbers of a class by its name, None where they are NaN; `confusion` as rows.

        Raises DataError unless there is one name for each class.
        """
        if len(names) != len(self.iou) or len(set(names)) != len(names):
            got = f"got {len(names)}: {', '.join(names)}; pass the names of the data set that was scored."
            raise DataError(f"class names: expected {len(self.iou)} different names, {got}")
        whole = {name: getattr(self, name) for name in ("miou", "global_accuracy", "class_accuracy", "pixels")}
        of_class = {name: getattr(self, name).tolist() for name in ("iou", "accuracy", "precision", "class_pixels")}
        named = {what: dict(zip(names, numbers, strict=True)) for what, numbers in of_class.items()}
        return plain({**whole, **named, "confusion": self.confusion.tolist()})


def scores(confusion: np.ndarray) -> Scores:
    """Scores of a confusion matrix (K, K) of pixel counts, rows the ground truth, columns the prediction.

    Sum the matrices of all images first: VOC scores the whole set at once, not the mean over images. Raises
    DataError for anything but a square matrix of integers that are not negative.
    """
    square = confusion.ndim == 2 and confusion.shape[0] == confusion.shape[1] and confusion.size > 0
    if not square or not np.issubdtype(confusion.dtype, np.integer) or confusion.min() < 0:
        got = f"got {confusion.dtype} {confusion.shape}; pass the sum of the matrices of the images."
        raise DataError(f"confusion matrix: expected a square matrix of counts that are not negative, {got}")
    confusion = confusion.astype(np.int64)
    right = confusion.diagonal()  # (K,)
    truth, prediction = confusion.sum(axis=1), confusion.sum(axis=0)  # (K,)
    iou = _ratio(right, truth + prediction - right)
    accuracy = _ratio(right, truth)
    return Scores(
        iou=iou,
        miou=mean_of_numbers(iou),
        global_accuracy=float(_ratio(right.sum(), truth.sum())),
        class_accuracy=mean_of_numbers(accuracy),
        accuracy=accuracy,
        precision=_ratio(right, prediction),
        confusion=confusion,
    )


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Counts (classes, classes), int64, of pixels: rows the truth, columns the prediction, a class everywhere.

    Pixels whose truth is no class, void (255) among them, are not counted.
    """
    counted = truth < classes
    pairs = truth[counted].astype(np.int64) * classes + prediction[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


class MetricsLog:
    """The figures of a run, metrics.jsonl: one JSON object a line, each with an integer `step`.

    A row is complete on its line or it does not count: a kill while writing leaves at most a torn last line,
    which reading leaves out and the next row replaces. Errors in writing are TrainingErrors, in reading
    DataErrors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, row: Mapping[str, object]) -> None:
        """Add one row and hand it to the operating system, so that a kill does not lose it.

        NumPy scalars are taken as numbers; NaN and infinity become null, because JSON has no such numbers.
        Raises TrainingError for a row without an integer `step` or with values that JSON cannot hold.
        """
        try:
            line = _encoded(row)
        except (TypeError, ValueError) as error:
            expected = "a row of numbers and text with an integer step"
            raise TrainingError(f"{self.path}: expected {expected}, got {row!r}; {error}") from error
        try:
            # Unbuffered, so that closing the file has nothing left to write that could fail or be lost.
            with self.path.open("a+b", buffering=0) as file:
                _drop_torn_line(file)
                while line:
                    line = line[file.write(line) :]
        except OSError as error:
            problem = f"could not be written: {reason(error)}, then continue with --resume."
            raise TrainingError(f"{self.path}: {problem}") from error

    def truncate_after(self, step: int, validation_due: bool = False) -> None:
        """Drop the rows with a larger step and a torn last line, atomically; without a log, do nothing.

        With `validation_due` the validation of that step goes, too: it did not come to its end, and is made up for.
        To resume from a checkpoint at `step`. Raises DataError for a damaged log and TrainingError where it cannot be
        written.
        """
        if not self.path.exists():
            return
        rows = [row for row in self.read(self.path) if row["step"] <= step]
        kept = [_encoded(row) for row in rows if not (validation_due and row["step"] == step and "miou" in row)]
        try:
            write_durably(self.path, kept)
        except OSError as error:
            problem = f"could not be written: {reason(error)}. The old log is complete."
            raise TrainingError(f"{self.path}: {problem}") from error

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """The rows of a log in order, without a torn last line.

        Raises DataError for a file that cannot be read and for a line that is damaged, with its number.
        """
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            problem = f"expected the metrics of a run, got {error.strerror}; check the path of the run."
            raise DataError(f"{path}: {problem}") from error
        rows = []
        for number, line in enumerate(lines[:-1], start=1):  # behind the last line feed stands nothing, or a torn line
            row: Any = None
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
            if not (isinstance(row, dict) and type(row.get("step")) is int):
                expected = f"expected a JSON object with an integer step, got {line[:60]!r}; remove the line."
                raise DataError(f"{path}: line {number}: {expected}")
            rows.append(row)
        return rows


def _encoded(row: Mapping[str, Any]) -> bytes:
    numbers = plain(row)
    if type(numbers.get("step")) is not int:
        raise ValueError("add step=...")
    return json.dumps(numbers, allow_nan=False).encode() + b"\n"


def _drop_torn_line(file: FileIO) -> None:
    """Cut off what follows the last line feed; a row appended to it would be lost with it."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.readall().rfind(b"\n") + 1)


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """numerator / denominator in float64, NaN without a warning where the denominator is 0."""
    quotient = np.full(np.shape(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=np.not_equal(denominator, 0))
    return quotient


def mean_of_numbers(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN where nothing is left."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else math.nan


def plain(value: Any) -> Any:
    """A copy for JSON: NumPy scalars as Python numbers, NaN and infinity as None, nested ones too."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
