"""Batches in an order that depends on the seed alone, prepared by threads ahead of the consumer.

What a sample looks like comes from (seed, epoch, index) and the order from (seed, epoch). So neither the
number of threads nor a stop and resume in mid-epoch changes what the network sees.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat, takewhile
from time import perf_counter
from typing import TypeVar

import numpy as np

from segnet_scratch.data.transforms import EvalTransform, TrainTransform
from segnet_scratch.data.voc import VOCDataset
from segnet_scratch.errors import DataError
from segnet_scratch.runtime.workers import worker_count

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # told how many are done, of how many


@dataclass(frozen=True)
class Batch:
    """images: float32 (N, H, W, 3), normalised; labels: uint8 (N, H, W), 255 = void; ids: N names."""

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream of one sample in one epoch, from these three numbers (all >= 0) alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, index)))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The indices 0..count-1 in the order of this epoch: int64 (count,)."""
    # A spawn key of another length than the samples' keeps the order independent of their streams.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).permutation(count)


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    weigh: Callable[[Item], int] = lambda item: 0,
    most: int = 0,
) -> Generator[Result, None, None]:
    """function(item) for every item, in order, computed by threads up to `ahead` items in advance.

    What items weigh bounds them too: those in advance weigh `most` together, or there is one. With workers 0 everything
    runs in the calling thread. An exception of `function` or of `items` is raised where its result would have come.
    Closing the iterator drops what has not begun and waits for what has.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="segnet-data")
    pending: deque[tuple[Future[Result], int]] = deque()
    held, fault = 0, None
    iterator = iter(items)
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:  # what was asked for before it comes first
                fault = error
                break
            pending.append((pool.submit(function, item), weigh(item)))
            held += pending[-1][1]
            while len(pending) > ahead or (held > most and len(pending) > 1):
                done, weight = pending.popleft()
                held -= weight
                yield done.result()
        while pending:
            yield pending.popleft()[0].result()
        if fault is not None:
            raise fault
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def parallel_map(
    function: Callable[[Item], Result], items: Collection[Item], workers: int | None = None, progress: Progress = silent
) -> Generator[Result, None, None]:
    """function(item) of every item, in order. workers: threads, as many as cores unless given."""
    workers = worker_count() if workers is None else workers
    with closing(ordered_map(function, items, workers, ahead=4 * workers)) as results:
        for done, result in enumerate(results, start=1):
            progress(done, len(items))
            yield result


def in_background(items: Iterator[Item], ahead: int) -> Generator[Item, None, None]:
    """The items, taken from their iterator by a thread, up to `ahead` of them in advance."""
    end = object()
    with closing(ordered_map(lambda _: next(items, end), repeat(None), 1, ahead)) as taken:
        yield from takewhile(lambda item: item is not end, taken)


class Loader:
    """Batches of a data set, epoch by epoch.

    batch: samples a batch. drop_last: leave out a last batch that is not full. workers: threads (0: none; decoding
    releases Python's lock, so threads suffice). skip_bad: the next sample of the data set stands in for one that
    cannot be read. share: (rank, ranks) of several processes that make the same steps: of each batch rank r has samples
    r, r + ranks, ..., so that all make equally many steps, and those of batches in equal parts are spread over each
    part.
    Attributes: batches_per_epoch; prefetch, batches that are prepared ahead; waited, the seconds consumers have spent
    waiting for data in all; bad, what was said of each sample that another stood in for, by its index.
    Raises DataError for an argument out of range, an empty data set, or one too small for a full batch
    with drop_last, or, shared, with a batch that does not give each rank a sample.
    """

    prefetch = 2

    def __init__(
        self,
        dataset: VOCDataset,
        transform: TrainTransform | EvalTransform,
        batch: int,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 2,
        skip_bad: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        for name, value, least in (("batch", batch, 1), ("seed", seed, 0), ("workers", workers, 0)):
            if value < least:
                raise DataError(f"loader: {name} {value}: expected at least {least}.")
        count = len(dataset)
        if count == 0:
            raise DataError("loader: the data set holds no samples; use a split that is not empty.")
        if drop_last and count < batch:
            raise DataError(
                f"loader: {count} samples do not fill one batch of {batch}, and drop_last leaves out "
                f"what does not fill a batch; use a batch of at most {count}."
            )
        smallest = min(batch, count if drop_last else (count - 1) % batch + 1)
        if smallest < share[1]:
            raise DataError(
                f"loader: a batch of {smallest} of {count} samples does not give each of {share[1]} ranks one; use "
                "fewer ranks, or a larger batch."
            )
        self.dataset, self.transform, self.batch, self.share = dataset, transform, batch, share
        self.seed, self.workers = seed, workers
        self.batches_per_epoch = count // batch if drop_last else -(-count // batch)
        self.waited = 0.0
        self.bad: dict[int, str] = {}
        self._skip_bad = skip_bad
        self._begun = 0  # epochs, by iteration

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the next epoch: 0 in the first loop over the loader, 1 in the second, and so on."""
        self._begun += 1
        return self.epoch(self._begun - 1)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.batches_per_epoch

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """A sample of the data set, or what stands in for it; DataError where there is none."""
        for place in (*range(index, len(self.dataset)), *range(index)):
            try:
                return self.dataset.sample(place)
            except DataError as error:
                if not self._skip_bad or len(self.bad) == len(self.dataset):
                    raise
                if place not in self.bad:
                    self.bad[place] = str(error)
                    log.warning("left out (%d so far): %s", len(self.bad), error)
        raise DataError(f"loader: not one of {len(self.dataset)} samples can be read; see segnet data verify.")

    def epoch(self, epoch_number: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch (0, 1, ...) from `start_batch` on; earlier ones are not even decoded.

        A damaged sample raises its DataError when its batch is due. Close the iterator to stop early.
        Raises DataError for an epoch or batch that does not exist.
        """
        if epoch_number < 0:
            raise DataError(f"loader: epoch {epoch_number}: expected at least 0.")
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise DataError(f"loader: start_batch {start_batch}: expected 0..{self.batches_per_epoch}.")
        order = epoch_order(len(self.dataset), self.seed, epoch_number)
        starts = range(start_batch * self.batch, self.batches_per_epoch * self.batch, self.batch)
        rank, ranks = self.share
        return self._batches(epoch_number, [order[s : s + self.batch][rank::ranks].tolist() for s in starts])

    def _batches(self, epoch_number: int, batches: list[list[int]]) -> Generator[Batch, None, None]:
        height, width = self.transform.size

        def places() -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
            """Every sample with its place in its batch: threads fill the batch, nothing is copied twice."""
            for indices in batches:
                images = np.empty((len(indices), height, width, 3), np.float32)
                labels = np.empty((len(indices), height, width), np.uint8)
                for position, index in enumerate(indices):
                    yield images, labels, position, index

        def prepare(place: tuple[np.ndarray, np.ndarray, int, int]) -> tuple[np.ndarray, np.ndarray, str]:
            images, labels, position, index = place
            image, mask, name = self.sample(index)
            rng = sample_rng(self.seed, epoch_number, index)
            images[position], labels[position] = self.transform(image, mask, rng)
            return images, labels, name

        with closing(ordered_map(prepare, places(), self.workers, self.prefetch * self.batch)) as results:
            for indices in batches:
                began = perf_counter()
                done = [next(results) for _ in indices]
                self.waited += perf_counter() - began
                images, labels, _ = done[0]
                yield Batch(images, labels, tuple(name for _, _, name in done))
