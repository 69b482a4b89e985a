"""Evaluation by the VOC protocol: the image resized to the network's size, the logits resized to the ground truth's."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.boundary import boundary_f1
from segnet_scratch.data import EvalTransform, VOCDataset, ordered_map
from segnet_scratch.errors import DataError
from segnet_scratch.inference import Inference, classify, resize, segment
from segnet_scratch.metrics import Scores, mean_of_numbers, scores
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.ops.loss.confusion import ConfusionAccumulate
from segnet_scratch.ops.loss.cross_entropy import CrossEntropyForward
from segnet_scratch.ops.op import spec_of
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet


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
    boundary_f1: the mean over the images that have a contour; None where it was not asked for.
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
    boundary: bool = False,
) -> Evaluation:
    """Scores a model on every image of a data set; `advance` is told how many images each batch had.

    `inference` averages several predictions; `boundary` asks for boundary F1 too. The model is left in the mode it was
    in. DataError where the model has another number of classes than the data set, ConfigError where `inference` does
    not fit the model.
    """
    if dataset.classes != model.classes:
        raise DataError(
            f"{dataset.root}: the data set has {dataset.classes} classes, the model {model.classes}; evaluate it on "
            "the data it was trained for, or check labels.txt"
        )
    inference = inference or Inference()
    inference.check(model, size)
    confusion = np.zeros((model.classes, model.classes), np.int64)
    loss_sums = np.zeros(3)
    images: list[ImageScore] = []
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            for samples in _batches(dataset, EvalTransform(size), batch, workers):
                labels, sums = _predict(model, samples, size, inference)
                loss_sums += sums
                for sample, prediction in zip(samples, labels, strict=True):
                    counts = _confusion(model, sample.mask, prediction)
                    f1 = _boundary_score(model, sample.mask, prediction) if boundary else None
                    confusion += counts
                    images.append(_image_score(sample.id, counts, f1))
                advance(len(samples))
    finally:
        model.train(was_training)
    loss = float(loss_sums[0] / loss_sums[1]) if loss_sums[1] else 0.0
    return Evaluation(
        scores(confusion),
        loss if inference.single else math.nan,
        len(dataset),
        tuple(dataset.names),
        mean_of_numbers(np.array([image.boundary_f1 for image in images], float)) if boundary else None,
        tuple(images),
    )


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


def _confusion(model: SegNet, mask: np.ndarray, prediction: Array) -> np.ndarray:
    """The confusion matrix of one image, int64 (classes, classes)."""
    device = model.device
    counts = device.zeros((model.classes, model.classes), np.uint64)
    op = ConfusionAccumulate.plan(mask.size, model.classes)
    op(device, truth=device.upload(mask.reshape(-1)), prediction=prediction.reshape(-1), counts=counts)
    return device.download(counts).astype(np.int64)


def _boundary_score(model: SegNet, mask: np.ndarray, prediction: Array) -> float:
    """Boundary F1 of one image: the mean over its classes, NaN without a contour."""
    f1 = boundary_f1(mask, model.device.download(prediction)[0])
    return mean_of_numbers(np.array(list(f1.values())))


def _image_score(name: str, counts: np.ndarray, f1: float | None) -> ImageScore:
    image = scores(counts)
    return ImageScore(name, image.miou, image.global_accuracy, image.pixels, f1)


def _json_number(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no NaN


def _loss_sums(model: SegNet, logits: Array, labels: np.ndarray) -> np.ndarray:
    flat = logits.reshape(-1, model.classes)
    op = CrossEntropyForward.plan(spec_of(flat))
    labels = model.device.upload(labels.reshape(-1))
    return model.device.download(op(model.device, logits=flat, labels=labels, class_weights=None).sums)


def _batches(dataset: VOCDataset, transform: EvalTransform, batch: int, workers: int) -> Iterator[list[_Sample]]:
    rng = np.random.default_rng(0)  # an EvalTransform draws nothing from it

    def prepare(index: int) -> _Sample:
        image, mask, name = dataset.sample(index)
        return _Sample(name, image, mask, *transform(image, mask, rng))

    samples: list[_Sample] = []
    for sample in ordered_map(prepare, range(len(dataset)), workers, ahead=2 * batch):
        samples.append(sample)
        if len(samples) == batch:
            yield samples
            samples = []
    if samples:
        yield samples
