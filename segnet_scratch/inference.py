"""How a network is applied to an image: once at its input size, or many times with the results averaged."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import add
from typing import Any, TypeVar

import numpy as np

from segnet_scratch.config import AUTO, MINIMUM_SIZE
from segnet_scratch.data import normalise, ordered_map, resize_image
from segnet_scratch.data.drawing import row_blocks
from segnet_scratch.errors import ConfigError, DeviceMemoryError
from segnet_scratch.inference_step import InferenceStep
from segnet_scratch.nn import functions
from segnet_scratch.nn.autograd import Tensor, no_grad
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.loss.argmax import ArgmaxForward
from segnet_scratch.ops.op import spec_of
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearForward, Rows, source_rows
from segnet_scratch.runtime.devices import Array, PendingDownload
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.runtime.workers import CHUNK_VALUES, parallel_slices, worker_count
from segnet_scratch.segnet import SegNet
from segnet_scratch.step import resolve

BYTES_AHEAD = 1 << 28  # of decoded images, and of results, that may wait for their turn
_BLOCK = 8 << 20  # logits in the size of the image that are held at a time
_WINDOW_PIXELS = 1 << 18  # of windows that go through the network together, on a CPU; a GPU takes four times as many

Item = TypeVar("Item")
What = TypeVar("What")
Segmented = tuple[What, np.ndarray, "Segmentation"]  # what an item is, its image, what was found in it


@dataclass(frozen=True)
class Inference:
    """What is averaged: test-time augmentation, windows, samples. By default nothing: one pass at the input size.

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
        if self.window is None and self.stride is not None:
            raise ConfigError("a stride is given without a window; give the size of the window too")
        if self.window is not None:
            if min(self.window) < MINIMUM_SIZE:
                raise ConfigError(f"window {_sides(self.window)}: expected at least {MINIMUM_SIZE} pixels on each side")
            stride = self.stride or (self.window[0] * 3 // 4, self.window[1] * 3 // 4)
            if not all(1 <= step <= side for step, side in zip(stride, self.window, strict=True)):
                expected = f"1 pixel up to the window's {_sides(self.window)}, or what lies between two is never seen"
                raise ConfigError(f"stride {_sides(stride)}: expected {expected}")
            object.__setattr__(self, "stride", stride)

    @property
    def views(self) -> list[tuple[float, bool]]:
        """(scale, mirrored) of every view of the image."""
        return [(scale, flip) for scale in self.scales for flip in ((False, True) if self.flip else (False,))]

    @property
    def single(self) -> bool:
        """Is one pass at the network's input size all, so that nothing is averaged?"""
        return self == Inference()

    def check(self, model: SegNet, size: tuple[int, int]) -> None:
        """ConfigError where this does not fit a network or its input size (height, width)."""
        if self.samples and not model.has_dropout:
            why = "the network has no dropout, so that all would be equal; train one with --set dropout=true"
            raise ConfigError(f"samples {self.samples}: {why}")
        smallest = scaled(size, min(self.scales))
        if self.window is None and min(smallest) < MINIMUM_SIZE:
            given = f"scale {min(self.scales):g} of the input size {_sides(size)} is {_sides(smallest)}"
            raise ConfigError(f"{given}; expected at least {MINIMUM_SIZE} pixels on each side; give a larger size")


@dataclass(frozen=True)
class Segmentation:
    """What a network makes of one image (h, w).

    labels: uint8 (h, w).
    logits: float32 (h, w, classes) where they were asked for; of an average over scales, mirror images or samples, the
        logarithm of the mean probabilities, whose softmax are these probabilities again.
    uncertainty: float32 (h, w) where samples were drawn: the variance of the softmax over them, mean over the classes.
    """

    labels: np.ndarray
    logits: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


class Segmenter:
    """A network made ready to segment images: its inference step, its input size, what is averaged.

    `batch` images go through the network together where nothing is averaged. The model is put into evaluation mode;
    the fused engine takes the weights as they are now. For one thread at a time. `watch` is told of the windows of an
    image that are done, and of how many there are. ConfigError where `inference` or the engine does not fit the model.
    """

    def __init__(
        self,
        model: SegNet,
        size: tuple[int, int],
        inference: Inference | None = None,
        engine: str = AUTO,
        precision: str = AUTO,
        batch: int | None = None,
    ) -> None:
        self.model, self.device, self.size, self.inference = model, model.device, size, inference or Inference()
        self.inference.check(model, size)
        engine, precision = resolve(model, engine, precision, training=self.inference.samples > 0)
        self.step = InferenceStep(model, engine, precision)
        self._on_gpu = self.device.architecture is not None
        self.batch = batch or (4 if self._on_gpu else 1)
        self.workers = min(8, worker_count())  # threads that decode and resize, and as many that encode
        self.watch: Callable[[int, int], None] = lambda done, windows: None
        self.images = 0  # that have gone through the network so far
        self._timer, self._seconds = self.device.timer(), 0.0
        self._marks: deque[tuple[Any, Any]] = deque()  # before and after each pass

    def __str__(self) -> str:
        return f"{self.step.engine} engine in {self.step.precision} on {self.device.name}"

    def __call__(self, image: np.ndarray, with_logits: bool = False) -> Segmentation:
        """Segments an RGB image, uint8 (h, w, 3)."""
        height, width = image.shape[:2]
        self.images += 1
        samples = range(self.inference.samples) if self.inference.samples else (None,)
        views = [[self._view(image, *view, sample) for view in self.inference.views] for sample in samples]
        self._done, self._windows = 0, sum(view.windows for of_sample in views for view in of_sample)
        if len(views) == len(views[0]) == 1:
            return self._read(views[0][0], with_logits)()
        labels = np.empty((height, width), np.uint8)
        logits = np.empty((height, width, self.model.classes), np.float32) if with_logits else None
        uncertainty = np.empty((height, width), np.float32) if self.inference.samples else None
        for rows in self._row_blocks((height, width)):
            mean, variance = self._mean(views, rows)
            labels[rows] = mean.argmax(axis=2)
            if logits is not None:
                logits[rows] = np.log(np.maximum(mean, np.finfo(np.float32).tiny))
            if uncertainty is not None:
                uncertainty[rows] = variance
        return Segmentation(labels, logits, uncertainty)

    def stream(
        self,
        items: Iterable[Item],
        load: Callable[[Item], tuple[What, np.ndarray]],
        workers: int | None = None,
        weigh: Callable[[Item], int] = lambda item: 0,
        with_logits: bool = False,
        watch: Callable[[Sequence[What], Array], None] = lambda whats, logits: None,
    ) -> Generator[Segmented[What], None, None]:
        """(what, image, segmentation) of every item, in order; a GPU works on the next batch while one is read back.

        `load` says what an item is, and gives its image; threads call it ahead, for images of BYTES_AHEAD as `weigh`
        tells their bytes. `watch` is shown the logits (n, *size, channels) of each batch, where nothing is
        averaged.
        """

        def prepare(item: Item) -> tuple[What, np.ndarray, np.ndarray]:
            what, image = load(item)
            return what, image, self._pixels(image, self.size) if self.inference.single else image

        threads = self.workers if workers is None else workers
        with closing(ordered_map(prepare, items, threads, 2 * self.batch, weigh, BYTES_AHEAD)) as ready:
            if not self.inference.single:
                yield from ((what, image, self(image, with_logits)) for what, image, _ in ready)
                return
            groups = iter(lambda: list(islice(ready, self.batch)), [])
            waiting: list[tuple[What, np.ndarray, Callable[[], Segmentation]]] = []
            with closing(self.device.prefetch(groups, lambda g: [np.concatenate([p for _, _, p in g])])) as batches:
                try:
                    parts = (part for batch, (pixels,) in batches for part in self._passes(batch, pixels))
                    for batch, logits in parts:
                        watch([what for what, _, _ in batch], logits)
                        self.images += len(batch)
                        begun = []
                        for k, (what, image, _) in enumerate(batch):
                            view = _Whole(self, logits[k : k + 1], image.shape, False)
                            begun.append((what, image, self._read(view, with_logits)))
                        if self._on_gpu:  # which works on this batch while the one before goes on
                            waiting, begun = begun, waiting
                        yield from ((what, image, read()) for what, image, read in begun)
                except Exception:
                    yield from ((what, image, read()) for what, image, read in waiting)
                    raise
                yield from ((what, image, read()) for what, image, read in waiting)

    def _passes(self, batch: list[What], pixels: Array) -> Iterable[tuple[list[What], Array]]:
        """Items and their logits: all of a batch, or from here on one by one where memory is short for more."""
        try:
            return [(batch, self.forward(pixels))]
        except (DeviceMemoryError, MemoryError):
            if len(batch) == 1:
                raise
            self.batch = 1
        return (([item], self.forward(pixels[k : k + 1])) for k, item in enumerate(batch))

    @property
    def seconds(self) -> float:
        """That the network alone has taken so far, on the device's clock."""
        self._take_time(0)
        return self._seconds

    def seen(self, windows: int) -> None:
        """So many more windows of this image have gone through the network."""
        self._done += windows
        self.watch(self._done, self._windows)

    def _take_time(self, left: int) -> None:
        while len(self._marks) > left:
            self._seconds += self._timer.seconds(*self._marks.popleft())

    def _read(self, view: "_View", with_logits: bool) -> Callable[[], Segmentation]:
        """The classes of a view's largest logits, on their way to the host; logits, if any, are there at once."""
        labels = np.empty(view.size, np.uint8)
        logits = np.empty((*view.size, self.model.classes), np.float32) if with_logits else None
        parts = []
        for rows in self._row_blocks(view.size):
            found = view.rows(rows)
            parts.append((rows, self.device.download_async([classify(self.model, found)])))
            if logits is not None:
                logits[rows] = self.device.download(found)[0, ..., : self.model.classes]

        def get() -> Segmentation:
            for rows, download in parts:
                labels[rows] = download.get()[0][0]
            return Segmentation(labels, logits)

        return get

    def _row_blocks(self, size: tuple[int, int]) -> Iterator[slice]:
        return row_blocks(size, _BLOCK // self.step.channels)

    def _mean(self, views: "list[list[_View]]", rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean probabilities (h, w, classes) of some rows, and their variance (h, w) where there are samples.

        The variance is from the summed squared deviations from the mean, by Welford's recurrence.
        """
        mean: Any = 0.0
        squares: Any = 0.0
        with no_grad():
            for sample, of_sample in enumerate(views):
                total = reduce(add, (self._probabilities(view, rows) for view in of_sample))
                probabilities = total / len(of_sample)
                if len(views) == 1:
                    return _as_numpy(probabilities), None
                deviation = probabilities - mean
                mean = mean + deviation / (sample + 1)
                squares = squares + deviation * (probabilities - mean)
            return _as_numpy(mean), _as_numpy(squares.mean(axis=2) / len(views))

    def _probabilities(self, view: "_View", rows: slice) -> Any:
        """Those of some rows of a view (h, w, classes): on a GPU a Tensor, which stays there, else an array."""
        found = view.rows(rows)
        logits = (found if self._on_gpu else self.device.download(found))[0, ..., : self.model.classes]
        logits = logits[:, ::-1] if view.flip else logits
        if self._on_gpu:
            return functions.softmax(Tensor(self.device.copy(logits), self.device))
        return softmax(logits)

    def _view(self, image: np.ndarray, scale: float, flip: bool, sample: int | None) -> "_View":
        image = image[:, ::-1] if flip else image
        if self.inference.window is not None:
            return _Windows(self, image, scaled(image.shape, scale), flip, sample)
        logits = self.forward(self._pixels(image, scaled(self.size, scale)), sample)
        return _Whole(self, self.device.copy(logits), image.shape, flip)  # the next view's step overwrites them

    def _pixels(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """An image as a batch for the network, (1, *size, 3)."""
        return normalise(resize_image(image, size)).astype(self.model.dtype, copy=False)[None]

    def forward(self, pixels: Array, sample: int | None = None) -> Array:
        """Logits (n, h, w, channels) of normalised pixels (n, h, w, 3), not in bfloat16."""
        begun = self._timer.mark()
        logits = self.step(pixels, sample)
        self._marks.append((begun, self._timer.mark()))
        self._take_time(16)
        if logits.dtype == BFLOAT16:
            logits = Cast.plan(spec_of(logits))(self.device, x=logits).y
        return logits


def _as_numpy(found: Any) -> np.ndarray:
    return found.numpy() if isinstance(found, Tensor) else found


def classify(model: SegNet, logits: Array) -> Array:
    """Labels uint8 (n, h, w) of logits (n, h, w, classes)."""
    return ArgmaxForward.plan(spec_of(logits))(model.device, logits=logits).labels


def scaled(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """(height, width) times a factor, rounded, at least one pixel."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows along one side of an image begin: every `stride` pixels, and the last one at the border."""
    return [*range(0, length - window, stride), max(0, length - window)]


class _Whole:
    """A view of the whole of an image (h, w, 3), mirrored or not: logits (1, ., ., channels)."""

    windows = 0  # it has been through the network

    def __init__(self, segmenter: Segmenter, logits: Array, shape: tuple[int, ...], flip: bool) -> None:
        self.segmenter, self.logits, self.size, self.flip = segmenter, logits, (shape[0], shape[1]), flip

    def rows(self, rows: slice) -> Array:
        """Logits (1, h, w, channels) of some rows, in the size of the image; asked for from top to bottom."""
        return _resized(self, self.segmenter, rows, self.logits, 0, self.logits.shape[1])


def _resized(view: "_View", segmenter: Segmenter, rows: slice, logits: Array, low: int, height: int) -> Array:
    part = Rows(rows.start, rows.stop - rows.start, low, height)
    return ResizeBilinearForward.plan(spec_of(logits), view.size, part)(segmenter.device, x=logits).y


class _Windows:
    """Windows over an image, the logits of those that overlap averaged.

    Only so many rows are held as the windows that are not done reach over: what a pixel's windows add up to does not
    depend on it.
    """

    def __init__(
        self, segmenter: Segmenter, image: np.ndarray, size: tuple[int, int], flip: bool, sample: int | None
    ) -> None:
        self._segmenter, self._sample, self.flip = segmenter, sample, flip
        self.size = image.shape[0], image.shape[1]
        self._pixels = image if size == image.shape[:2] else resize_image(np.ascontiguousarray(image), size)
        window, stride = segmenter.inference.window, segmenter.inference.stride
        assert window is not None
        assert stride is not None
        self._window, self._dtype = window, segmenter.model.dtype
        lengths = max(size[0], window[0]), max(size[1], window[1])
        self._tops, self._lefts = map(window_starts, lengths, window, stride)
        pixels = _WINDOW_PIXELS * (4 if segmenter.device.architecture else 1)
        self._together = max(1, pixels // (window[0] * window[1]))
        self.windows = len(self._tops) * len(self._lefts)
        # How many windows see a row, and a column: their product is how many see a pixel.
        self._in_rows, self._in_columns = map(_coverage, lengths, window, (self._tops, self._lefts))
        self._first = 0  # the row that the sums begin with
        self._sums = np.zeros((0, lengths[1], segmenter.step.channels), self._dtype)

    def rows(self, rows: slice) -> Array:
        """As `_Whole.rows`."""
        height, width = self._pixels.shape[:2]
        same = (height, width) == self.size
        low, high = rows.start, rows.stop
        if not same:
            low, high = source_rows(low, high - low, self.size[0], height)
        while self._tops and self._tops[0] < high:
            self._add_windows(self._tops.pop(0), low)
        part = slice(low - self._first, high - self._first)
        seen = self._in_rows[low:high, None, None] * self._in_columns[:width, None]
        logits = self._segmenter.device.upload((self._sums[part, :width] / seen.astype(self._dtype))[None])
        return logits if same else _resized(self, self._segmenter, rows, logits, low, height)

    def _add_windows(self, top: int, low: int) -> None:
        """The windows of one row, from `top` on; the sums above `low` are needed no more."""
        height, width = self._window
        missing = max(0, top + height - self._first - len(self._sums))
        fresh = np.zeros((missing, *self._sums.shape[1:]), self._sums.dtype)
        self._sums = np.concatenate([self._sums[max(0, low - self._first) :], fresh])
        self._first = max(self._first, low)
        sums = self._sums[top - self._first : top - self._first + height]
        earlier: tuple[Sequence[int], PendingDownload] | None = None
        for begin in range(0, len(self._lefts), self._together):
            lefts = self._lefts[begin : begin + self._together]
            windows = np.zeros((len(lefts), height, width, 3), self._dtype)  # 0 is the mean colour
            for window, left in zip(windows, lefts, strict=True):
                pixels = self._pixels[top : top + height, left : left + width]
                window[: pixels.shape[0], : pixels.shape[1]] = normalise(pixels)
            download = self._segmenter.device.download_async([self._segmenter.forward(windows, self._sample)])
            if earlier:  # a GPU computes these windows while those before are added
                self._add(sums, *earlier)
            earlier = lefts, download
        if earlier:
            self._add(sums, *earlier)

    def _add(self, sums: np.ndarray, lefts: Sequence[int], download: PendingDownload) -> None:
        (found,) = download.get()
        for left, logits in zip(lefts, found, strict=True):
            sums[:, left : left + self._window[1]] += logits
        self._segmenter.seen(len(lefts))


_View = _Whole | _Windows


def _coverage(length: int, side: int, starts: Sequence[int]) -> np.ndarray:
    """In how many windows each position along a side lies."""
    seen = np.zeros(length, np.int64)
    for start in starts:
        seen[start : start + side] += 1
    return seen


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32, over the last axis of logits (rows, w, classes)."""
    powers = np.empty(logits.shape, np.float32)

    def body(rows: slice) -> None:
        part = powers[rows]
        np.exp(logits[rows] - logits[rows].max(axis=-1, keepdims=True), out=part, dtype=np.float32)
        part /= part.sum(axis=-1, keepdims=True)

    parallel_slices(len(logits), max(1, CHUNK_VALUES // logits[0].size), body)
    return powers


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
