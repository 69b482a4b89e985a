"""The threads that share one NumPy operation, and the scratch memory that each of them keeps.

NumPy releases Python's lock inside its loops and matrix products, so plain threads use all cores. The
functions of this package cut their work by the shapes of the arrays alone, never by the number of threads:
the same input gives the same bits on any number of them.
"""

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import ConfigError

# Values in a chunk of an element-wise pass. Half a megabyte of float32 stays in an L2 cache from one
# step to the next, and a NumPy call on it outlasts the hand-over of Python's lock (measured: 2**15 to 2**20).
CHUNK_VALUES = 1 << 17

_this_thread = threading.local()


def worker_count() -> int:
    """Number of threads that share an operation: `SEGNET_THREADS`, else the cores this process may run on.

    Raises ConfigError where the variable is not a whole number of at least 1.
    """
    text = os.environ.get("SEGNET_THREADS")
    if text is None:
        # sched_getaffinity honours containers and taskset; macOS lacks it.
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"SEGNET_THREADS: expected a whole number of at least 1, got {text!r}; unset it to use all cores."
        )
    return int(text)


def parallel_for(count: int, body: Callable[[int], None]) -> None:
    """Calls `body(i)` once for each i in 0..count-1, on all workers in any order, and waits for all of them.

    The calling thread works too. Inside, BLAS is single-threaded and floating-point warnings are off: NaN and
    infinity pass as values. A call from inside a body runs inline; calls from several threads take turns. After
    an exception no further body starts, and the first exception is raised here.
    """
    if getattr(_this_thread, "is_inside", False):
        for index in range(count):
            body(index)
        return
    pending = deque(range(count))
    errors: list[BaseException] = []

    def work() -> None:
        _this_thread.is_inside = True
        try:
            with np.errstate(all="ignore"):
                while (index := _take(pending)) is not None:
                    body(index)
        except BaseException as error:
            errors.append(error)
            pending.clear()
        finally:
            _this_thread.is_inside = False

    def help_out() -> None:
        # Some BLAS libraries have a limit per thread.
        with _blas.limited():
            work()

    with single_threaded_blas():
        helpers = _pool.submit(help_out, min(worker_count(), count) - 1)
        try:
            work()
        finally:
            # To wake a helper that has nothing left to do would only cost time.
            wait([helper for helper in helpers if not helper.cancel()])
    if errors:
        raise errors[0]


def parallel_slices(length: int, step: int, body: Callable[[slice], None]) -> None:
    """Calls `body` as parallel_for does, with the slices 0..step, step..2*step, ... that cover 0..length."""
    parallel_for(-(-length // step), lambda i: body(slice(i * step, min((i + 1) * step, length))))


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """While inside, matrix products use the calling thread only. Nests; several threads take turns.

    The limit of most BLAS libraries is one for the whole process: a thread that left would lift it for the rest.
    """
    pool = _pool
    with pool.lock:
        if pool.is_limited:
            yield
            return
        pool.is_limited = True
        try:
            with _blas.limited():
                yield
        finally:
            pool.is_limited = False


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """This thread's workspace of that name: a C-contiguous array with undefined contents.

    The memory is kept, because the first touch of fresh pages costs more than a pass over warm ones. A second
    call with the same name hands out the same memory.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    held: dict[str, np.ndarray] = _this_thread.__dict__.setdefault("scratch", {})
    if name not in held or held[name].size < size:
        held[name] = np.empty(size, np.uint8)
    return held[name][:size].view(dtype).reshape(shape)


def _take(pending: deque[int]) -> int | None:
    """The next index; None when all are taken."""
    try:
        return pending.popleft()
    except IndexError:
        return None


class _Pool:
    """The helper threads of this process, and the lock under which one operation at a time uses them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_limited = False
        self.executor: ThreadPoolExecutor | None = None
        self.threads = 0

    def submit(self, work: Callable[[], None], helpers: int) -> list[Future[None]]:
        """Starts `work` on `helpers` threads besides the caller's."""
        if helpers < 1:
            return []
        if self.executor is None or self.threads < helpers:
            if self.executor is not None:
                self.executor.shutdown(wait=False)
            self.executor = ThreadPoolExecutor(helpers, thread_name_prefix="segnet")
            self.threads = helpers
        return [self.executor.submit(work) for _ in range(helpers)]


class _Blas:
    """The BLAS libraries of this process. NumPy and SciPy bring one each, and an import may load another."""

    def __init__(self) -> None:
        self.modules = 0
        self.libraries: Any = None

    def limited(self) -> AbstractContextManager[object]:
        """While inside, each of them has one thread."""
        # To look through the loaded libraries takes milliseconds, to set a limit microseconds: look after imports only.
        if self.modules != len(sys.modules):
            try:
                from threadpoolctl import ThreadpoolController
            except ModuleNotFoundError:  # BLAS keeps its threads: slower, and right
                return nullcontext()
            self.libraries = ThreadpoolController().select(user_api="blas")
            self.modules = len(sys.modules)
        return self.libraries.limit(limits=1)


_blas = _Blas()
_pool = _Pool()


def _start_afresh_in_child() -> None:
    # A forked child inherits no helper threads, and perhaps a lock that is held by a thread it lacks.
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_in_child)
