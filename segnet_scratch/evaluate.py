"""Evaluation by the VOC protocol: the image resized to the network's size, the logits resized to the ground truth's."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.boundary import Boundary, authors_boundary_f1, boundary_f1
from segnet_scratch.data import EvalTransform, VOCDataset, ordered_map
from segnet_scratch.errors import DataError
from segnet_scratch.inference import Inference, classify, resize, segment
from segnet_scratch.metrics import Scores, mean_of_numbers, scores
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.ops.loss.confusion import ConfusionAccumulate
from segnet_scratch.ops.loss.cross_entropy import CrossEntropyForward
from segnet_scratch.ops.op import spec_of
from segnet_scratch.runtime.devices import Array, Device
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
        result = {**self.scores.to_json(self.names), "loss": _json_number(self.loss), "images": self.images}
        if self.boundary_f1 is not None:
            result["boundary_f1"] = _json_number(self.boundary_f1)
        return result


class Tally:
    """Adds up what predictions score, image after image: for networks of ours and for label maps from elsewhere."""

    def __init__(self, names: Sequence[str], device: Device, boundary: Boundary | None = None) -> None:
        self._names, self._device, self._boundary = tuple(names), device, boundary
        self._confusion = np.zeros((len(names), len(names)), np.int64)
        self._images: list[ImageScore] = []

    def add(self, name: str, truth: np.ndarray, prediction: Array) -> None:
        """Counts one image: its ground truth uint8 (h, w), and its prediction uint8 (h, w) on the device."""
        counts = self._count(truth, prediction)
        self._confusion += counts
        image = scores(counts)
        f1 = self._boundary_score(truth, prediction) if self._boundary else None
        self._images.append(ImageScore(name, image.miou, image.global_accuracy, image.pixels, f1))

    def evaluation(self, loss: float = math.nan) -> Evaluation:
        """The scores of all that was added."""
        found = np.array([image.boundary_f1 for image in self._images], float)
        if self._boundary is Boundary.authors:
            found = np.nan_to_num(found)
        f1 = mean_of_numbers(found) if self._boundary else None
        return Evaluation(scores(self._confusion), loss, len(self._images), self._names, f1, tuple(self._images))

    def _count(self, truth: np.ndarray, prediction: Array) -> np.ndarray:
        """The confusion matrix of one image, int64 (classes, classes)."""
        counts = self._device.zeros(self._confusion.shape, np.uint64)
        op = ConfusionAccumulate.plan(truth.size, len(self._names))
        truth = self._device.upload(truth.reshape(-1))
        op(self._device, truth=truth, prediction=prediction.reshape(-1), counts=counts)
        return self._device.download(counts).astype(np.int64)

    def _boundary_score(self, truth: np.ndarray, prediction: Array) -> float:
        """Boundary F1 of one image: the mean over its classes, NaN without a contour."""
        measure = authors_boundary_f1 if self._boundary is Boundary.authors else boundary_f1
        f1 = measure(truth, self._device.download(prediction))
        return mean_of_numbers(np.array(list(f1.values())))


@dataclass(frozen=True)
class _Sample:
    id: str
    image: np.ndarray  # at its own size
    mask: np.ndarray  # at its own size
    input: np.ndarray  # normalised, at the network's size
    small_mask: np.ndarray  # at the network's size


def evaluate(
    model: SegNet,
    dataset: VOCDataset,
    size: tuple[int, int],
    batch: int = 4,
    workers: int = 2,
    advance: Callable[[int], None] = lambda images: None,
    inference: Inference | None = None,
    boundary: Boundary | None = None,
    skip_bad: bool = False,
) -> Evaluation:
    """Scores a model on every image of a data set; `advance` is told how many images each batch had.

    `inference` averages several predictions; `boundary` asks for boundary F1 too. The model is left in the mode it was
    in. With `skip_bad` images that cannot be read are left out, each with a warning. DataError where none can be, where
    the model's classes are not the data set's (`check_classes`), ConfigError where `inference`
    does not fit the model.
    """
    check_classes(model, dataset)
    inference = inference or Inference()
    inference.check(model, size)
    tally = Tally(dataset.names, model.device, boundary)
    loss_sums = np.zeros(3)
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            for samples in _batches(dataset, EvalTransform(size), batch, workers, skip_bad):
                labels, sums = _predict(model, samples, size, inference)
                loss_sums += sums
                for sample, prediction in zip(samples, labels, strict=True):
                    tally.add(sample.id, sample.mask, prediction.reshape(sample.mask.shape))
                advance(len(samples))
    finally:
        model.train(was_training)
    loss = float(loss_sums[0] / loss_sums[1]) if loss_sums[1] else 0.0
    return tally.evaluation(loss if inference.single else math.nan)


def check_classes(model: SegNet, dataset: VOCDataset) -> None:
    """DataError where a model was trained on other classes than the data set has, as far as its checkpoint tells.

    Another number, or the same names in another order. Only other names may be another language: a warning.
    """
    trained = tuple(model.metadata.get("classes") or dataset.names)
    if dataset.classes != model.classes:
        raise DataError(
            f"{dataset.root}: the data set has {dataset.classes} classes, the model {model.classes}; evaluate it on "
            "the data it was trained for, or check labels.txt"
        )
    differ = [label for label, (one, other) in enumerate(zip(trained, dataset.names, strict=False)) if one != other]
    if not differ:
        return
    label = differ[0]
    problem = (
        f"{dataset.root}: class {label} is '{dataset.names[label]}', for the checkpoint '{trained[label]}' "
        f"({len(differ)} of {dataset.classes} classes differ)"
    )
    if {trained[label] for label in differ} & set(dataset.names):
        raise DataError(f"{problem}, and classes change places; use the data it was trained for, or correct labels.txt")
    log.warning("%s; do they mean the same?", problem)


def _predict(
    model: SegNet, samples: list[_Sample], size: tuple[int, int], inference: Inference
) -> tuple[Iterator[Array], np.ndarray]:
    """Labels uint8 (1, h, w) on the device, one image after the other, and the loss sums, 0 for averages."""
    if not inference.single:
        averaged = (segment(model, sample.image, size, inference).labels[None] for sample in samples)
        return map(model.device.upload, averaged), np.zeros(3)
    logits = model(np.stack([sample.input for sample in samples]).astype(model.dtype, copy=False)).data
    sums = _loss_sums(model, logits, np.stack([sample.small_mask for sample in samples]))
    resized = (resize(model, logits[i : i + 1], sample.mask.shape) for i, sample in enumerate(samples))
    return (classify(model, full) for full in resized), sums


def _json_number(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no NaN


def _loss_sums(model: SegNet, logits: Array, labels: np.ndarray) -> np.ndarray:
    flat = logits.reshape(-1, model.classes)
    op = CrossEntropyForward.plan(spec_of(flat))
    labels = model.device.upload(labels.reshape(-1))
    return model.device.download(op(model.device, logits=flat, labels=labels, class_weights=None).sums)


def _batches(
    dataset: VOCDataset, transform: EvalTransform, batch: int, workers: int, skip_bad: bool
) -> Iterator[list[_Sample]]:
    rng = np.random.default_rng(0)  # an EvalTransform draws nothing from it

    def prepare(index: int) -> _Sample | None:
        try:
            image, mask, name = dataset.sample(index)
        except DataError as error:
            if not skip_bad:
                raise
            log.warning("left out of %s: %s", dataset.split, error)
            return None
        return _Sample(name, image, mask, *transform(image, mask, rng))

    samples: list[_Sample] = []
    found = False
    for sample in ordered_map(prepare, range(len(dataset)), workers, ahead=2 * batch):
        if sample is None:
            continue
        found = True
        samples.append(sample)
        if len(samples) == batch:
            yield samples
            samples = []
    if samples:
        yield samples
    if not found:
        raise DataError(f"{dataset.root}: not one image of split '{dataset.split}' can be read; see segnet data verify")
