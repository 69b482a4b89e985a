"""How a network is applied to an image: once at its input size, or many times with the results averaged."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from segnet_scratch.config import MINIMUM_SIZE
from segnet_scratch.data import normalise, resize_image
from segnet_scratch.data.drawing import row_blocks
from segnet_scratch.errors import ConfigError
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.nn.modules import dropout_sampling
from segnet_scratch.ops.elementwise.dropout import STATE
from segnet_scratch.ops.loss.argmax import ArgmaxForward
from segnet_scratch.ops.op import spec_of
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearForward, Rows, source_rows
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet

_BLOCK = 8 << 20  # logits in the size of the image that are held at a time


@dataclass(frozen=True)
class Inference:
    """What is averaged; as it stands, nothing: one pass over the image at the network's input size.

    Every pass ends in softmax probabilities at the size of the image, and the prediction is the class of the largest
    mean probability.

    scales: the input size times each of these.
    flip: every pass also on the mirrored image.
    window, stride: (height, width). The image keeps its own size (times the scale) and the network sees windows of it;
        the logits of windows that overlap are averaged. The last window of a row or column ends at the border of the
        image. Where the image is smaller than a window, it is padded with the mean colour. The stride is three quarters
        of a window unless given: half of one costs 2.25 times the time.
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
        stride = self.stride or (self.window[0] * 3 // 4, self.window[1] * 3 // 4)
        if not all(1 <= step <= side for step, side in zip(stride, self.window, strict=True)):
            raise ConfigError(
                f"stride {_sides(stride)}: expected 1 pixel up to the window's {_sides(self.window)}, or "
                "what lies between two windows is never seen"
            )
        object.__setattr__(self, "stride", stride)

    @property
    def views(self) -> list[tuple[float, bool]]:
        """(scale, mirrored) of every look at the image."""
        return [(scale, flip) for scale in self.scales for flip in ((False, True) if self.flip else (False,))]

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
    height, width = image.shape[:2]
    labels = np.empty((height, width), np.uint8)
    logits = np.empty((height, width, model.classes), np.float32) if with_logits else None
    uncertainty = np.empty((height, width), np.float32) if inference.samples else None
    with no_grad():
        views = [
            [_view(model, image, size, scale, flip, sample, inference) for scale, flip in inference.views]
            for sample in (range(inference.samples) if inference.samples else (None,))
        ]
        for rows in row_blocks((height, width), _BLOCK // model.classes):
            count = rows.stop - rows.start
            if inference.single:
                found = views[0][0].rows(rows.start, count)
                labels[rows] = model.device.download(classify(model, found))[0]
                if logits is not None:
                    logits[rows] = model.device.download(found)[0]
                continue
            mean, variance = _mean(model, views, rows.start, count)
            labels[rows] = mean.argmax(axis=2)
            if logits is not None:
                logits[rows] = np.log(np.maximum(mean, np.finfo(np.float32).tiny))
            if uncertainty is not None:
                uncertainty[rows] = variance
    return Segmentation(labels, logits, uncertainty)


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


def _mean(model: SegNet, views: list[list["_View"]], first: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean probabilities (count, w, classes) of some rows, and their variance (count, w) where there are samples."""
    mean = squares = np.zeros((1, 1, 1), np.float32)  # summed squared deviations from the mean, by Welford's recurrence
    for sample, of_sample in enumerate(views):
        total = np.zeros((1, 1, 1), np.float32)
        for view in of_sample:
            logits = model.device.download(view.rows(first, count))[0]
            total = total + _softmax(logits[:, ::-1] if view.flip else logits)
        probabilities = total / np.float32(len(of_sample))
        if len(views) == 1:
            return probabilities, None
        deviation = probabilities - mean
        mean = mean + deviation / np.float32(sample + 1)
        squares = squares + deviation * (probabilities - mean)
    return mean, squares.mean(axis=2) / np.float32(len(views))


class _View(Protocol):
    """The network's logits for one look at an image, rows at a time and from top to bottom."""

    flip: bool  # whether they are mirrored

    def rows(self, first: int, count: int) -> Array:
        """Logits (1, count, w, classes) of some rows, in the size of the image."""


def _view(
    model: SegNet,
    image: np.ndarray,
    size: tuple[int, int],
    scale: float,
    flip: bool,
    sample: int | None,
    inference: Inference,
) -> _View:
    image = image[:, ::-1] if flip else image
    if inference.window is not None and inference.stride is not None:
        return _Windows(model, image, scaled(image.shape, scale), inference.window, inference.stride, flip, sample)
    logits = _forward(model, normalise(resize_image(image, scaled(size, scale))), sample)
    return _Whole(model, logits, (image.shape[0], image.shape[1]), flip)


@dataclass
class _Whole:
    """The image as a whole, in the network's input size."""

    model: SegNet
    logits: Array  # (1, ., ., classes)
    size: tuple[int, int]  # of the image
    flip: bool

    def rows(self, first: int, count: int) -> Array:
        rows = Rows(first, count, 0, self.logits.shape[1])
        return ResizeBilinearForward.plan(spec_of(self.logits), self.size, rows)(self.model.device, x=self.logits).y


class _Windows:
    """Windows over an image, the logits of those that overlap averaged.

    Only so many rows are held as the windows that are not done reach over: what a pixel's windows add up to does not
    depend on it.
    """

    def __init__(
        self,
        model: SegNet,
        image: np.ndarray,
        size: tuple[int, int],
        window: tuple[int, int],
        stride: tuple[int, int],
        flip: bool,
        sample: int | None,
    ) -> None:
        self._model, self._window, self._sample = model, window, sample
        self._image_size = image.shape[0], image.shape[1]
        self.flip = flip
        self._pixels = image if size == image.shape[:2] else resize_image(np.ascontiguousarray(image), size)
        lengths = max(size[0], window[0]), max(size[1], window[1])
        self._tops, self._lefts = map(window_starts, lengths, window, stride)
        # How many windows see a row, and a column: their product is how many see a pixel.
        self._in_rows, self._in_columns = map(_coverage, lengths, window, (self._tops, self._lefts))
        self._first = 0  # the row that the sums begin with
        self._sums = np.zeros((0, max(size[1], window[1]), model.classes), model.dtype)

    def rows(self, first: int, count: int) -> Array:
        height, width = self._pixels.shape[:2]
        same = (height, width) == self._image_size
        low, high = (first, first + count) if same else source_rows(first, count, self._image_size[0], height)
        while self._tops and self._tops[0] < high:
            self._add_windows(self._tops.pop(0), low)
        part = slice(low - self._first, high - self._first)
        seen = self._in_rows[low:high, None, None] * self._in_columns[:width, None]
        logits = self._model.device.upload((self._sums[part, :width] / seen.astype(self._model.dtype))[None])
        if same:
            return logits
        rows = Rows(first, count, low, height)
        return ResizeBilinearForward.plan(spec_of(logits), self._image_size, rows)(self._model.device, x=logits).y

    def _add_windows(self, top: int, low: int) -> None:
        """The windows of one row, from `top` on; the sums above `low` are needed no more."""
        height, width = self._window
        missing = max(0, top + height - self._first - len(self._sums))
        fresh = np.zeros((missing, *self._sums.shape[1:]), self._sums.dtype)
        self._sums = np.concatenate([self._sums[max(0, low - self._first) :], fresh])
        self._first = max(self._first, low)
        for left in self._lefts:
            pixels = self._pixels[top : top + height, left : left + width]
            padded = np.zeros((height, width, 3), np.float32)  # 0 is the mean colour
            padded[: pixels.shape[0], : pixels.shape[1]] = normalise(pixels)
            logits = self._model.device.download(_forward(self._model, padded, self._sample))[0]
            self._sums[top - self._first : top - self._first + height, left : left + width] += logits


def _coverage(length: int, side: int, starts: Sequence[int]) -> np.ndarray:
    """In how many windows each position along a side lies."""
    seen = np.zeros(length, np.int64)
    for start in starts:
        seen[start : start + side] += 1
    return seen


def _forward(model: SegNet, pixels: np.ndarray, sample: int | None) -> Array:
    """Logits (1, h, w, classes) of normalised pixels (h, w, 3); with a sample under its dropout masks."""
    with _sampling(model, sample) if sample is not None else nullcontext():
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
