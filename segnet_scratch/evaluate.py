"""Evaluation by the VOC protocol: the image resized to the network's size, the logits resized to the ground truth's."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from segnet_scratch.autograd import no_grad
from segnet_scratch.data import EvalTransform, VOCDataset, ordered_map
from segnet_scratch.device import Array
from segnet_scratch.errors import DataError
from segnet_scratch.metrics import Scores, scores
from segnet_scratch.ops.argmax import ArgmaxForward
from segnet_scratch.ops.confusion import ConfusionAccumulate
from segnet_scratch.ops.cross_entropy import CrossEntropyForward
from segnet_scratch.ops.op import spec_of
from segnet_scratch.ops.resize_bilinear import ResizeBilinearForward
from segnet_scratch.segnet import SegNet


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split, and its loss there (unweighted, at the network's size)."""

    scores: Scores
    loss: float
    images: int
    names: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """`miou`, `global_accuracy`, `class_accuracy`, `iou` by class name, `loss`, `images`."""
        loss = self.loss if math.isfinite(self.loss) else None  # JSON has no NaN
        return {**self.scores.to_json(self.names), "loss": loss, "images": self.images}


@dataclass(frozen=True)
class _Sample:
    image: np.ndarray  # normalised, at the network's size
    small_mask: np.ndarray  # at the network's size
    mask: np.ndarray  # at its own size


def evaluate(
    model: SegNet,
    dataset: VOCDataset,
    size: tuple[int, int],
    batch: int = 4,
    workers: int = 2,
    advance: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Scores a model on every image of a data set; `advance` is told how many images each batch had.

    The model is left in the mode it was in. DataError where the model has another number of classes than the data set.
    """
    if dataset.classes != model.classes:
        raise DataError(
            f"{dataset.root}: the data set has {dataset.classes} classes, the model {model.classes}; evaluate it on "
            "the data it was trained for, or check labels.txt"
        )
    device = model.device
    counts = device.zeros((model.classes, model.classes), np.uint64)
    sums = np.zeros(3)
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            for samples in _batches(dataset, EvalTransform(size), batch, workers):
                logits = model(np.stack([s.image for s in samples]).astype(model.dtype, copy=False)).data
                sums += _loss_sums(model, logits, np.stack([s.small_mask for s in samples]))
                for i, sample in enumerate(samples):
                    prediction = classify(model, logits[i : i + 1], sample.mask.shape)
                    op = ConfusionAccumulate.plan(sample.mask.size, model.classes)
                    truth = device.upload(sample.mask.reshape(-1))
                    op(device, truth=truth, prediction=prediction.reshape(-1), counts=counts)
                advance(len(samples))
    finally:
        model.train(was_training)
    confusion = device.download(counts).astype(np.int64)
    loss = float(sums[0] / sums[1]) if sums[1] else 0.0
    return Evaluation(scores(confusion), loss, len(dataset), tuple(dataset.names))


def classify(model: SegNet, logits: Array, size: tuple[int, ...]) -> Array:
    """Labels uint8 (1, height, width) of logits (1, h, w, classes), resized to `size` first."""
    resized = resize(model, logits, size)
    return ArgmaxForward.plan(spec_of(resized))(model.device, logits=resized).labels


def resize(model: SegNet, logits: Array, size: tuple[int, ...]) -> Array:
    """Logits (1, height, width, classes) resized bilinearly to `size`."""
    return ResizeBilinearForward.plan(spec_of(logits), (size[0], size[1]))(model.device, x=logits).y


def _loss_sums(model: SegNet, logits: Array, labels: np.ndarray) -> np.ndarray:
    flat = logits.reshape(-1, model.classes)
    op = CrossEntropyForward.plan(spec_of(flat))
    labels = model.device.upload(labels.reshape(-1))
    return model.device.download(op(model.device, logits=flat, labels=labels, class_weights=None).sums)


def _batches(dataset: VOCDataset, transform: EvalTransform, batch: int, workers: int) -> Iterator[list[_Sample]]:
    rng = np.random.default_rng(0)  # an EvalTransform draws nothing from it

    def prepare(index: int) -> _Sample:
        image, mask, _ = dataset.sample(index)
        return _Sample(*transform(image, mask, rng), mask)

    samples: list[_Sample] = []
    for sample in ordered_map(prepare, range(len(dataset)), workers, ahead=2 * batch):
        samples.append(sample)
        if len(samples) == batch:
            yield samples
            samples = []
    if samples:
        yield samples
