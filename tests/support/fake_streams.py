"""Streams, events and memory of the stand-in for CuPy: who may touch what when.

Work is carried out at once, in the order in which it is asked for. What a GPU might have done in another order is found
by clocks instead (Lamport's happened-before, as race detectors for threads have it): every stream and the host have a
vector clock; an event carries the clock of its stream to whoever waits for it. An access to bytes that an earlier
access of another stream may still overlap is a Race, however it turned out here. A recording may have branches: streams
that wait for an event of it; each replay carries them out on streams of their own.
"""

import threading
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

DEFAULT = 0  # the default stream's number


class Race(AssertionError):
    """Something happens to memory that another stream may be using."""


class Clock(dict):
    """How much of each stream's work is known to be done, by its number."""

    def learn(self, other: "Clock") -> None:
        for number, tick in other.items():
            self[number] = max(self.get(number, 0), tick)

    def knows(self, number: int, tick: int) -> bool:
        return self.get(number, 0) >= tick


class Timeline:
    """All clocks of one stand-in. `problems` is what was found where nothing could be raised."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.host = Clock()
        self.default = Stream(self, number=DEFAULT)
        self.streams = {DEFAULT: self.default}
        self.current = threading.local()
        self.recording: Stream | None = None
        self.recorder = 0  # the thread that records
        self.synchronisations = 0
        self.pending: list[PinnedCopy | Arrival] = []
        self.problems: list[str] = []

    def new_stream(self, non_blocking: bool = False) -> "Stream":
        assert non_blocking, "such a stream waits for the default stream: nothing overlaps"
        with self.lock:
            stream = self.streams[len(self.streams)] = Stream(self, number=len(self.streams))
        return stream

    def current_stream(self) -> "Stream":
        entered = getattr(self.current, "entered", None)
        return entered[-1] if entered else self.default

    def host_learns(self, clock: Clock) -> None:
        """The host has waited; what pinned memory holds now may be looked at."""
        with self.lock:
            # Relaxed capture, as CuPy's is, leaves other threads alone.
            recording = self.recording is not None and self.recorder == threading.get_ident()
            assert not recording, "cudaErrorStreamCaptureUnsupported: waiting while a stream is recorded"
            self.synchronisations += 1
            self.host.learn(clock)
            done = [copy for copy in self.pending if self.host.knows(*copy.stamp)]
            self.pending = [copy for copy in self.pending if copy not in done]
            for copy in done:
                copy.check()

    def milliseconds(self, first: "Event", last: "Event") -> float:
        """CuPy's get_elapsed_time: both with timing, recorded, and known to the host to be reached."""
        times = []
        for event in (first, last):
            assert event.timed, "cudaErrorInvalidResourceHandle"
            assert event.time is not None, "an event that nobody recorded"
            assert all(self.host.knows(*stamp) for stamp in event.clock.items()), "cudaErrorNotReady"
            times.append(event.time)
        return 1e3 * (times[1] - times[0])

    def finish(self) -> None:
        """At the end of a test: what is left of copies is looked at, and problems are raised."""
        for copy in self.pending:
            copy.check()
        if self.problems:
            raise Race("; ".join(self.problems))


class Stream:
    """A queue of work. While it is recorded, by itself or as a branch of another, work goes into `capture`."""

    def __init__(self, timeline: Timeline, number: int) -> None:
        self._timeline, self.number = timeline, number
        self.ptr = 0x57000 + number  # what other libraries call it by
        self.clock = Clock()
        self.capture: Capture | None = None

    def __enter__(self) -> "Stream":
        current = self._timeline.current
        current.entered = [*getattr(current, "entered", []), self]
        return self

    def __exit__(self, *_: object) -> None:
        self._timeline.current.entered.pop()

    def run(self, work: "Callable[[Stream], None]") -> None:
        """Carries work out, or records it."""
        if self.capture is not None:
            self.capture.add(self, work)
            return
        recording = self._timeline.recording
        assert recording is None or self.number != DEFAULT, "work on the default stream while another is recorded"
        work(self)

    def tick(self) -> tuple[int, int]:
        """(this stream, number of a new piece of work). What the host knows of is done before it."""
        with self._timeline.lock:
            self.clock.learn(self._timeline.host)
            self.clock[self.number] = self.clock.get(self.number, 0) + 1
            return self.last

    @property
    def last(self) -> tuple[int, int]:
        """The last piece of work."""
        return self.number, self.clock.get(self.number, 0)

    def synchronize(self) -> None:
        assert self.capture is None, "cudaErrorStreamCaptureUnsupported: waiting for a stream that is recorded"
        self._timeline.host_learns(self.clock)

    def wait_event(self, event: "Event") -> None:
        if event.capture is not None and not event.capture.ended:
            event.capture.wait(self, event)
            return
        assert self.capture is None, "cudaErrorStreamCaptureIsolation: an event from outside of the recording"
        with self._timeline.lock:
            self.clock.learn(event.clock)

    def record(self, event: "Event") -> None:
        event.record(self)

    def begin_capture(self) -> None:
        assert self.number != DEFAULT, "cannot capture on the default (legacy) stream"
        assert self._timeline.recording is None
        self.capture, self._timeline.recording = Capture(self), self
        self._timeline.recorder = threading.get_ident()

    def end_capture(self) -> "Graph":
        capture, self._timeline.recording = self.capture, None
        assert capture is not None
        return Graph(self._timeline, capture.end())


class Capture:
    """What is recorded: work, marks and waits for them, each with the number of its stream."""

    def __init__(self, origin: Stream) -> None:
        self.streams = [origin]
        self.nodes: list[tuple[int, Callable[[Stream, dict[object, Clock]], None]]] = []
        self.clocks: dict[int, Clock] = {origin.number: Clock()}  # to see whether all branches are joined
        self.ended = False

    def add(self, stream: Stream, work: Callable[[Stream], None]) -> None:
        own = self.clocks[stream.number]
        own[stream.number] = own.get(stream.number, 0) + 1
        self.nodes.append((stream.number, lambda line, marks: work(line)))

    def record(self, stream: Stream, event: "Event") -> None:
        mark = event.mark = object()
        event.capture, event.clock = self, Clock(self.clocks[stream.number])
        self.nodes.append((stream.number, lambda line, marks: marks.update({mark: Clock(line.clock)})))

    def wait(self, stream: Stream, event: "Event") -> None:
        if stream.capture is None:
            assert stream.number != DEFAULT, "the default stream cannot be a branch of a recording"
            stream.capture = self
            self.streams.append(stream)
        mark = event.mark
        self.clocks.setdefault(stream.number, Clock()).learn(event.clock)
        self.nodes.append((stream.number, lambda line, marks: line.clock.learn(marks[mark])))

    def end(self) -> list[tuple[int, Callable[[Stream, dict[object, Clock]], None]]]:
        origin, *branches = (stream.number for stream in self.streams)
        joined = all(self.clocks[origin].knows(k, self.clocks[k].get(k, 0)) for k in branches)
        self.ended = True
        for stream in self.streams:
            stream.capture = None
        assert joined, "cudaErrorStreamCaptureUnjoined: work of a branch that the recorded stream does not wait for"
        return self.nodes


class Event:
    """A mark in a stream; a new one counts as reached."""

    def __init__(self, timeline: Timeline, disable_timing: bool) -> None:
        self._timeline, self.timed = timeline, not disable_timing
        self.clock = Clock()
        self.time: float | None = None  # when it was recorded; work is done at once here
        self.capture: Capture | None = None  # it belongs to a recording
        self.mark: object = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._timeline.current_stream()
        if stream.capture is not None:
            stream.capture.record(stream, self)
            return
        with self._timeline.lock:
            self.capture, self.clock = None, Clock(stream.clock)
            self.time = perf_counter()

    @property
    def done(self) -> bool:
        """A GPU may take as long as it likes: it is done where the host has waited for something later."""
        with self._timeline.lock:
            return all(self._timeline.host.knows(*stamp) for stamp in self.clock.items())

    def synchronize(self) -> None:
        self._timeline.host_learns(self.clock)


class Graph:
    """Recorded work."""

    def __init__(self, timeline: Timeline, nodes: list[tuple[int, Any]]) -> None:
        self._timeline, self.nodes = timeline, nodes

    def launch(self) -> None:
        stream = self._timeline.current_stream()
        assert stream.capture is None
        origin = self.nodes[0][0] if self.nodes else DEFAULT
        lines, marks = {origin: stream}, {}
        for number, work in self.nodes:
            if number not in lines:
                lines[number] = self._timeline.new_stream(non_blocking=True)
            work(lines[number], marks)


class Block:
    """Memory of the GPU, whichever arrays share it.

    It belongs to the stream that allocated it, as in CuPy's pool: free, it is handed out there again at once.
    """

    def __init__(self, timeline: Timeline, buffer: np.ndarray, pool: Any = None) -> None:
        stream = timeline.current_stream()
        self.timeline, self.buffer, self.pool = timeline, buffer, pool
        # Earlier work of the stream may still use what is given out now.
        self._accesses: Accesses = [(0, max(1, buffer.nbytes), stream.last, Clock())]
        weakref.finalize(self, _end_block, timeline, stream, self._accesses, buffer, pool).atexit = False

    def access(self, stream: Stream, stamp: tuple[int, int], writes: bool, what: str, part: np.ndarray) -> None:
        """Race where earlier work of another stream on these bytes may not be over."""
        first, end = (address - self.buffer.ctypes.data for address in np.lib.array_utils.byte_bounds(part))
        with self.timeline.lock:
            pieces: Accesses = []
            for start, stop, write, reads in self._accesses:
                below, above = max(start, first), min(stop, end)
                if below >= above:
                    pieces.append((start, stop, write, reads))
                    continue
                for number, tick in (write, *(reads.items() if writes else ())):
                    if not stream.clock.knows(number, tick):
                        raise Race(
                            f"{what} on stream {stream.number} {'writes' if writes else 'reads'} what stream {number} "
                            "may still be using: wait for an event"
                        )
                pieces += [(a, b, write, reads) for a, b in ((start, below), (above, stop)) if a < b]
                now = Clock() if writes else Clock(reads)
                if not writes:
                    now.learn(Clock([stamp]))
                pieces.append((below, above, stamp if writes else write, now))
            self._accesses[:] = pieces


# (first byte, last byte + 1, the last write (stream, tick) and, since then, the last read of each stream)
Accesses = list[tuple[int, int, tuple[int, int], Clock]]


def _end_block(timeline: Timeline, stream: Stream, accesses: Accesses, buffer: np.ndarray, pool: Any) -> None:
    if pool is not None and not pool.common:  # nobody else ever gets it
        pool.give_back(buffer)
        return
    known = Clock(timeline.host)
    known.learn(stream.clock)
    stamps = {stamp for _, _, write, reads in accesses for stamp in (write, *reads.items())}
    for number in {number for number, tick in stamps if not known.knows(number, tick)}:
        timeline.problems.append(f"memory of stream {stream.number} is freed while stream {number} may use it")
    if pool is not None:
        pool.give_back(buffer)


class PinnedMemory(bytearray):
    """Memory of the host that a copy reads while the host goes on."""


class PinnedCopy:
    """A copy on its way: what it reads must stay as it is until the host has waited for it."""

    def __init__(self, memory: PinnedMemory, source: np.ndarray, stamp: tuple[int, int]) -> None:
        self.stamp = stamp
        self.memory = weakref.ref(memory)
        self.start = source.__array_interface__["data"][0] - np.frombuffer(memory, np.uint8).ctypes.data
        self.contents = source.tobytes()

    def check(self) -> None:
        memory = self.memory()
        if memory is None:
            raise Race("pinned memory was freed while a copy may still read it")
        if memory[self.start : self.start + len(self.contents)] != self.contents:
            raise Race("pinned memory was overwritten while a copy may still read it")


class Arrival:
    """A copy to the host on its way: what it brings is there once the host has waited for it."""

    def __init__(self, target: np.ndarray, contents: np.ndarray, stamp: tuple[int, int]) -> None:
        self.target, self.contents, self.stamp = target, contents, stamp

    def check(self) -> None:
        np.copyto(self.target, self.contents)


def pinned_memory_of(array: np.ndarray) -> PinnedMemory | None:
    """What a NumPy array lies in, where that is pinned."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, PinnedMemory) else None
