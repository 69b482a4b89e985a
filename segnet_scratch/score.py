"""Predictions made elsewhere, scored as `evaluate` scores those of a network of ours."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from segnet_scratch.boundary import Boundary
from segnet_scratch.data import VOCDataset, ordered_map, read_mask
from segnet_scratch.data.pictures import decode, mask_labels
from segnet_scratch.errors import DataError, some_of
from segnet_scratch.evaluate import Evaluation, Scored, measure, summed


def score(
    predictions: Path,
    dataset: VOCDataset,
    boundary: Boundary | None = None,
    workers: int = 2,
    advance: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """The scores of `predictions/ID.png` for every image of a split: class numbers, indexed or grey, as large as masks.

    `advance` is told of each image. The loss is NaN: label maps have none. DataError for predictions that are missing,
    of another size than the ground truth, or that hold anything but numbers of classes.
    """
    files = [predictions / f"{name}.png" for name in dataset.ids]
    if missing := [path for path in files if not path.is_file()]:
        problem = f"{predictions}: {len(missing)} of {len(files)} predictions are missing:"
        fix = f"Name the folder that holds ID.png for every id of the list {dataset.split}."
        raise DataError(problem, *some_of(missing), fix)
    found: list[Scored] = []

    def score_one(index: int) -> Scored:
        truth = read_mask(dataset.mask_path(index), dataset.classes)
        prediction = _read_prediction(files[index], truth.shape, dataset.classes)
        return measure(dataset.ids[index], truth, prediction, dataset.classes, boundary)

    with closing(ordered_map(score_one, range(len(files)), workers, ahead=8)) as measured:
        for scored in measured:
            found.append(scored)
            advance(1)
    return summed(found, dataset.names, boundary)


def _read_prediction(path: Path, size: tuple[int, ...], classes: int) -> np.ndarray:
    labels = mask_labels(path, decode(path, "mask"))
    if labels.shape != size:
        sizes = f"{labels.shape[0]} x {labels.shape[1]} (height x width), its ground truth {size[0]} x {size[1]}"
        raise DataError(f"{path}: {sizes}; resize the logits to that size before taking the class")
    if labels.max() >= classes:
        expected = f"expected 0..{classes - 1} in every pixel, void or not, as the VOC development kit does"
        fix = "write numbers of classes, in the order of the data set"
        raise DataError(f"{path}: label {labels.max()}; {expected}; {fix}")
    return labels
