"""Evaluation by the VOC protocol: the image resized to the network's size, the logits resized to the ground truth's.

`score` scores predictions made elsewhere by the same code.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.boundary import Boundary, authors_boundary_f1, boundary_f1
from segnet_scratch.data import VOID, VOCDataset, ordered_map, read_mask, resize_mask
from segnet_scratch.data.pictures import decode, mask_labels
from segnet_scratch.errors import DataError, some_of
from segnet_scratch.inference import Segmented, Segmenter
from segnet_scratch.metrics import Scores, confusion_matrix, mean_of_numbers, plain, scores
from segnet_scratch.ops.loss.cross_entropy import CrossEntropyForward
from segnet_scratch.ops.op import spec_of
from segnet_scratch.parallel import ALONE, Communicator
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageScore:
    """The scores of one image; NaN where nothing of it could be scored (all void)."""

    id: str
    miou: float
    global_accuracy: float
    pixels: int
    boundary_f1: float | None  # None where it was not asked for


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split.

    loss: unweighted, at the network's size; NaN where predictions were averaged, which have no logits at that size.
    boundary_f1: the mean over the images that have a contour (as the authors do it, over all, 0 for one without); None
    where it was not asked for.
    """

    scores: Scores
    loss: float
    images: int
    names: tuple[str, ...]
    boundary_f1: float | None = None
    per_image: tuple[ImageScore, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`miou`, `global_accuracy`, `class_accuracy`, `iou` by class name and so on, `confusion`, `loss`, `images`.

        `boundary_f1` is there where it was asked for.
        """
        result = {**self.scores.to_json(self.names), "loss": self.loss, "images": self.images}
        if self.boundary_f1 is not None:
            result["boundary_f1"] = self.boundary_f1
        return plain(result)


Scored = tuple[ImageScore, np.ndarray]  # an image's scores, and its confusion matrix


def measure(name: str, truth: np.ndarray, prediction: np.ndarray, classes: int, boundary: Boundary | None) -> Scored:
    """What a prediction scores, of a network of ours or a label map from elsewhere; uint8 (h, w) both."""
    counts = confusion_matrix(truth, prediction, classes)
    image, f1 = scores(counts), None
    if boundary is not None:  # the mean over its classes, NaN without a contour
        contours = authors_boundary_f1 if boundary is Boundary.authors else boundary_f1
        f1 = mean_of_numbers(np.array(list(contours(truth, prediction).values())))
    return ImageScore(name, image.miou, image.global_accuracy, image.pixels, f1), counts


def summed(
    found: Sequence[Scored], names: Sequence[str], boundary: Boundary | None, loss: float = math.nan
) -> Evaluation:
    """The scores of all images together."""
    images, counts = tuple(image for image, _ in found), reduce(np.add, (of_image for _, of_image in found))
    f1 = np.array([image.boundary_f1 for image in images], float)
    if boundary is Boundary.authors:
        f1 = np.nan_to_num(f1)
    mean = mean_of_numbers(f1) if boundary else None
    return Evaluation(scores(counts), loss, len(images), tuple(names), mean, images)


_Truth = tuple[str, np.ndarray, np.ndarray]  # id, mask at its own size and at the network's


def evaluate(
    segmenter: Segmenter,
    dataset: VOCDataset,
    boundary: Boundary | None = None,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
    skip_bad: bool = False,
    ranks: Communicator = ALONE,
) -> Evaluation:
    """Scores a network on every image of a data set; `advance` is told of each image, `boundary` asks for boundary F1.

    Each of several `ranks` takes every so manyth image, and all have the scores of all images. `advance` is called by
    all of them equally often, with the images that they have done together.

    The model is left in the mode it was in. With `skip_bad` images that cannot be read are left out, each with a
    warning. DataError where none can be, and where the model's classes are not the data set's (`check_classes`).
    """
    model, device = segmenter.model, segmenter.device
    check_classes(model, dataset)
    losses, count = [], len(dataset)
    found: list[Scored] = []
    threads = segmenter.workers if workers is None else workers

    def load(index: int) -> tuple[_Truth, np.ndarray]:
        try:
            image, mask, name = dataset.sample(index)
        except DataError as error:
            if not skip_bad:
                raise
            log.warning("left out of %s: %s", dataset.split, error)
            image, mask, name = np.zeros((1, 1, 3), np.uint8), np.full((1, 1), VOID, np.uint8), ""
        return (name, mask, resize_mask(mask, segmenter.size)), image

    def watch(truths: Sequence[_Truth], logits: Array) -> None:
        labels = device.upload(np.stack([small for _, _, small in truths]))
        op = CrossEntropyForward.plan(spec_of(logits))
        losses.append(device.download_async([op(device, logits=logits, labels=labels, class_weights=None).sums]))

    def measured_of(result: Segmented[_Truth]) -> Scored:
        (name, mask, _), _, segmented = result
        return measure(name, mask, segmented.labels, dataset.classes, boundary)

    was_training = model.training
    try:
        with (
            closing(segmenter.stream(range(ranks.rank, count, ranks.size), load, threads, watch=watch)) as results,
            closing(ordered_map(measured_of, results, threads, ahead=2 * threads)) as measured,
        ):
            for done in range(0, count, ranks.size):
                found += islice(measured, 1)  # none where the images do not suffice for the last ranks
                advance(min(ranks.size, count - done))
    finally:
        model.train(was_training)
    sums = np.sum([download.get()[0] for download in losses], axis=0) if losses else np.zeros(3)
    of_ranks = ranks.all_gather((found, sums))
    rows = zip_longest(*(images for images, _ in of_ranks))  # in the order of the data set
    found = [scored for row in rows for scored in row if scored is not None and scored[0].id]
    if not found:
        raise DataError(f"{dataset.root}: not one image of split '{dataset.split}' can be read; see segnet data verify")
    if not segmenter.inference.single:
        return summed(found, dataset.names, boundary)
    sums = np.sum([of_rank for _, of_rank in of_ranks], axis=0)
    return summed(found, dataset.names, boundary, float(sums[0] / sums[1]) if sums[1] else 0.0)


def check_classes(model: SegNet, dataset: VOCDataset) -> None:
    """DataError where a model was trained on other classes than the data set has, as far as its checkpoint tells.

    Another number, or the same names in another order. Only other names may be another language: a warning.
    """
    trained = tuple(model.metadata.get("classes") or dataset.names)
    if dataset.classes != model.classes:
        counts = f"the data set has {dataset.classes} classes, the model {model.classes}"
        raise DataError(f"{dataset.root}: {counts}; evaluate it on the data it was trained for, or check labels.txt")
    differ = [label for label, (one, other) in enumerate(zip(trained, dataset.names, strict=False)) if one != other]
    if not differ:
        return
    label, many = differ[0], f"{len(differ)} of {dataset.classes} classes differ"
    names = f"class {label} is '{dataset.names[label]}', for the checkpoint '{trained[label]}'"
    problem = f"{dataset.root}: {names} ({many})"
    if {trained[label] for label in differ} & set(dataset.names):
        raise DataError(f"{problem}, and classes change places; use the data it was trained for, or correct labels.txt")
    log.warning("%s; do they mean the same?", problem)


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
