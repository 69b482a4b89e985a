"""One pass over the pictures of a data set, by threads: decoding releases Python's lock."""

import os
from collections.abc import Callable, Collection, Generator
from contextlib import closing
from typing import TypeVar

from segnet_scratch.data.loader import ordered_map

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # told how many are done, of how many


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def walk(
    function: Callable[[Item], Result], items: Collection[Item], workers: int | None = None, progress: Progress = silent
) -> Generator[Result, None, None]:
    """function(item) of every item, in order. workers: threads, as many as cores unless given."""
    workers = (os.cpu_count() or 1) if workers is None else workers
    with closing(ordered_map(function, items, workers, ahead=4 * workers)) as results:
        for done, result in enumerate(results, start=1):
            progress(done, len(items))
            yield result
