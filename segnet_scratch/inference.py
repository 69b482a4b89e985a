"""How a network is applied to an image: once at its input size, or many times with the results averaged."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from segnet_scratch.config import MINIMUM_SIZE
from segnet_scratch.data import normalise, resize_image
from segnet_scratch.errors import ConfigError
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.nn.modules import dropout_sampling
from segnet_scratch.ops.elementwise.dropout import STATE
from segnet_scratch.ops.loss.argmax import ArgmaxForward
from segnet_scratch.ops.op import spec_of
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearForward
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet


@dataclass(frozen=True)
class Inference:
    """What is averaged; as it stands, nothing: one pass over the image at the network's input size.

    Every pass ends in softmax probabilities at the size of the image, and the prediction is the class of the largest
    mean probability.

    scales: the input size times each of these.
    flip: every pass also on the mirrored image.
    window, stride: (height, width). The image keeps its own size (times the scale) and the network sees windows of it;
        the logits of windows that overlap are averaged. The last window of a row or column ends at the border of the
        image. Where the image is smaller than a window, it is padded with the mean colour. The stride is half a window
        unless given.
    samples: with dropout left on, so many times (Bayesian SegNet, arXiv 1511.02680); 0: dropout off. Sample k of every
        image has the same dropout masks, so that a result depends neither on other images nor on the seams of windows.

    Raises ConfigError for values that make no sense.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    samples: int = 0

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            raise ConfigError(f"scales {self.scales}: expected factors above 0 and up to 8, for example 0.75,1,1.25")
        if len(set(self.scales)) != len(self.scales):
            raise ConfigError(f"scales {self.scales}: one of them is given twice; each counts once")
        if self.samples < 0 or self.samples == 1:
            raise ConfigError(f"samples {self.samples}: expected at least 2, or 0 for a network without dropout")
        if self.window is None:
            if self.stride is not None:
                raise ConfigError("a stride is given without a window; give the size of the window too")
            return
        if min(self.window) < MINIMUM_SIZE:
            raise ConfigError(f"window {_sides(self.window)}: expected at least {MINIMUM_SIZE} pixels on each side")
        stride = self.stride or (self.window[0] // 2, self.window[1] // 2)
        if not all(1 <= step <= side for step, side in zip(stride, self.window, strict=True)):
            raise ConfigError(
                f"stride {_sides(stride)}: expected 1 pixel up to the window's {_sides(self.window)}, or "
                "what lies between two windows is never seen"
            )
        object.__setattr__(self, "stride", stride)

    @property
    def single(self) -> bool:
        """Whether one pass is all: nothing is averaged."""
        return self == Inference()

    def check(self, model: SegNet, size: tuple[int, int]) -> None:
        """ConfigError where this does not fit a network or its input size (height, width)."""
        if self.samples and not model.has_dropout:
            raise ConfigError(
                f"samples {self.samples}: the network has no dropout, so that all samples would be equal; train one "
                "with --set dropout=true"
            )
        smallest = scaled(size, min(self.scales))
        if self.window is None and min(smallest) < MINIMUM_SIZE:
            raise ConfigError(
                f"scale {min(self.scales):g} of the input size {_sides(size)} is {_sides(smallest)}; expected at least "
                f"{MINIMUM_SIZE} pixels on each side; give larger scales or a larger size"
            )


@dataclass(frozen=True)
class Segmentation:
    """What a network makes of one image (h, w).

    labels: uint8 (h, w).
    logits: float32 (h, w, classes) where they were asked for; of an average, the logarithm of the mean probabilities,
        whose softmax are these probabilities again.
    uncertainty: float32 (h, w) where samples were drawn: the variance of the softmax over them, mean over the classes.
    """

    labels: np.ndarray
    logits: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


def segment(
    model: SegNet,
    image: np.ndarray,
    size: tuple[int, int],
    inference: Inference | None = None,
    with_logits: bool = False,
) -> Segmentation:
    """Segments an RGB image, uint8 (h, w, 3), by a model in evaluation mode whose input size is `size`.

    ConfigError where `inference` does not fit the model.
    """
    inference = inference or Inference()
    inference.check(model, size)
    with no_grad():
        if not inference.single:
            mean, uncertainty = _average(model, image, size, inference)
            labels = mean.argmax(axis=2).astype(np.uint8)
            logits = np.log(np.maximum(mean, np.finfo(np.float32).tiny)) if with_logits else None
            return Segmentation(labels, logits, uncertainty)
        logits = resize(model, _forward(model, normalise(resize_image(image, size))), image.shape[:2])
        labels = model.device.download(classify(model, logits))[0]
        return Segmentation(labels, model.device.download(logits)[0] if with_logits else None)


def resize(model: SegNet, logits: Array, size: tuple[int, ...]) -> Array:
    """Logits (1, height, width, classes) resized bilinearly to `size`."""
    return ResizeBilinearForward.plan(spec_of(logits), (size[0], size[1]))(model.device, x=logits).y


def classify(model: SegNet, logits: Array) -> Array:
    """Labels uint8 (n, h, w) of logits (n, h, w, classes)."""
    return ArgmaxForward.plan(spec_of(logits))(model.device, logits=logits).labels


def scaled(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """(height, width) times a factor, rounded, at least one pixel."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows along one side of an image begin: every `stride` pixels, and the last one at the border."""
    return [*range(0, length - window, stride), max(0, length - window)]


def _average(
    model: SegNet, image: np.ndarray, size: tuple[int, int], inference: Inference
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean probabilities (h, w, classes), and the uncertainty (h, w) where there are samples."""
    mean = np.zeros((*image.shape[:2], model.classes), np.float32)
    squares = np.zeros_like(mean)  # summed squared deviations from the mean, by Welford's recurrence
    for sample in range(max(1, inference.samples)):
        with _sampling(model, sample) if inference.samples else nullcontext():
            probabilities = _mean_of_views(model, image, size, inference)
        deviation = probabilities - mean
        mean += deviation / (sample + 1)
        squares += deviation * (probabilities - mean)
    return mean, squares.mean(axis=2) / inference.samples if inference.samples else None


def _mean_of_views(model: SegNet, image: np.ndarray, size: tuple[int, int], inference: Inference) -> np.ndarray:
    """Probabilities (h, w, classes), averaged over scales and mirror images."""
    total = np.zeros((*image.shape[:2], model.classes), np.float32)
    flips = (False, True) if inference.flip else (False,)
    for scale in inference.scales:
        for flip in flips:
            logits = _view(model, image[:, ::-1] if flip else image, size, scale, inference)
            logits = model.device.download(resize(model, logits, image.shape[:2]))[0]
            total += _softmax(logits[:, ::-1] if flip else logits)
    return total / (len(inference.scales) * len(flips))


def _view(model: SegNet, image: np.ndarray, size: tuple[int, int], scale: float, inference: Inference) -> Array:
    """Logits (1, ., ., classes) of the image at one scale."""
    if inference.window is None or inference.stride is None:
        return _forward(model, normalise(resize_image(image, scaled(size, scale))))
    pixels = normalise(resize_image(image, scaled(image.shape, scale)))
    return model.device.upload(_windowed(model, pixels, inference.window, inference.stride)[None])


def _windowed(model: SegNet, pixels: np.ndarray, window: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """Logits (h, w, classes) of normalised pixels (h, w, 3), averaged over all windows that a pixel lies in."""
    height, width = pixels.shape[:2]
    padded = np.zeros((max(height, window[0]), max(width, window[1]), 3), pixels.dtype)  # 0 is the mean colour
    padded[:height, :width] = pixels
    total = np.zeros((*padded.shape[:2], model.classes), model.dtype)
    seen = np.zeros((*padded.shape[:2], 1), model.dtype)
    for top in window_starts(padded.shape[0], window[0], stride[0]):
        for left in window_starts(padded.shape[1], window[1], stride[1]):
            place = slice(top, top + window[0]), slice(left, left + window[1])
            total[place] += model.device.download(_forward(model, padded[place]))[0]
            seen[place] += 1
    return np.ascontiguousarray((total / seen)[:height, :width])


def _forward(model: SegNet, pixels: np.ndarray) -> Array:
    """Logits (1, h, w, classes) of normalised pixels (h, w, 3)."""
    return model(np.ascontiguousarray(pixels[None], dtype=model.dtype)).data


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32, over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float32)
    return powers / powers.sum(axis=-1, keepdims=True)


def _sampling(model: SegNet, sample: int) -> AbstractContextManager[None]:
    """Within it dropout drops although the model is in evaluation mode; batch norm keeps its running statistics."""
    return dropout_sampling(model.device.upload(np.array([0, sample], STATE.dtype)))


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
