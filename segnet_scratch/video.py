"""Videos and cameras: every frame segmented and written as an overlay video, by PyAV (the extra `video`).

Frames are read upright, in square pixels, with times that rise. What cameras, telephones and converters write seldom is
what the formats promise: mirrored pictures, covers, times that stand still or jump, broken packets. Players show such
films, so they are read here.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from segnet_scratch.data import in_background, ordered_map, resize_image
from segnet_scratch.data.drawing import Style, above
from segnet_scratch.errors import DataError, SegnetError, require
from segnet_scratch.files import atomic_file, reason
from segnet_scratch.inference import Segmented, Segmenter
from segnet_scratch.predict import plan_targets

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")
_AHEAD = 2  # frames that are decoded, and that wait to be encoded, while the network works
_CAMERA = re.compile(r"camera(?::(\d+))?")
_CAMERA_RATE = 30
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC of FFmpeg
_TICK = Fraction(1, 90_000)  # of the films that are written: MPEG's clock, finer than any frame rate
_REORDERED = 4  # frames, at most, that a time is earlier by where it is only mistaken; more begins another recording


@dataclass(frozen=True)
class Video:
    """A video file or a camera: what the user calls it, and how libav opens it."""

    name: str
    stem: str  # of the file made from it
    location: str
    format: str | None = None  # of a camera, the interface of the system
    path: Path | None = None  # of a file; a camera has none


def pyav() -> Any:
    """PyAV; MissingLibraryError where it is not installed."""
    return require("av", "video", "videos and cameras")


class Film:
    """An opened film or camera; `frames` gives its pictures."""

    def __init__(self, container: Any, name: str) -> None:
        self._container, self._name = container, name
        # The first versions of PyAV 14 do not tell which streams are covers.
        streams = [s for s in container.streams.video if not int(getattr(s, "disposition", 0)) & _ATTACHED_PICTURE]
        if not streams:
            raise DataError(f"{name}: holds no moving pictures; expected a video")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.base_rate or _CAMERA_RATE
        self.rate = Fraction(rate) if 1 <= rate <= 240 else Fraction(_CAMERA_RATE)  # frames a second, in name at least
        self.length = int(self._stream.frames)  # frames, as far as the file tells; else 0
        self.damaged = 0  # packets that could not be decoded

    def frames(self) -> Iterator[tuple[np.ndarray, Fraction]]:
        """Pictures uint8 (h, w, 3) as a player shows them, and when, in seconds from the first one, ever rising.

        Packets that are damaged are passed over and counted. DataError where the film breaks off.
        """
        av = pyav()
        # AVI has no times of presentation: what frames claim is in the order of decoding.
        clock = _Clock(1 / self.rate, by_decoding=self._container.format.name == "avi")
        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    self.damaged += 1
                    continue
                for frame in frames:
                    yield upright(frame, self._stream.sample_aspect_ratio), clock(frame)
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(f"{self._name}: breaks off: {error.strerror or error}") from error


class _Clock:
    """Times that rise, out of those that frames claim."""

    def __init__(self, interval: Fraction, by_decoding: bool = False) -> None:
        self._interval = interval  # from one frame to the next, in name at least
        self._step = interval  # and as it was last
        self._offset: Fraction | None = None
        self._last = -interval
        self._claimed: dict[str, int] = {}  # the last pts and dts
        self._faults = {"pts": int(by_decoding), "dts": 0}  # how often they did not rise

    def __call__(self, frame: Any) -> Fraction:
        time = self._last + self._step
        stamp = self._stamp(frame)
        if stamp is not None and frame.time_base is not None:
            claimed = stamp * Fraction(frame.time_base)
            # A camera's clock may have started at any time, and that of a recording that was appended too.
            if self._offset is None or claimed + self._offset < self._last - _REORDERED * self._interval:
                self._offset = time - claimed
            time = claimed + self._offset
            if self._last < time < self._last + 1:
                self._step = time - self._last
        self._last = max(time, self._last + _TICK)
        return self._last

    def _stamp(self, frame: Any) -> int | None:
        """The time of presentation, or that of decoding where it was right more often, as in AVI."""
        stamps: dict[str, int | None] = {"pts": frame.pts, "dts": frame.dts}
        for kind, stamp in stamps.items():
            if stamp is not None:
                self._faults[kind] += stamp <= self._claimed.get(kind, stamp - 1)
                self._claimed[kind] = stamp
        trusted = "dts" if "dts" in self._claimed and self._faults["dts"] < self._faults["pts"] else "pts"
        return stamps[trusted]


def upright(frame: Any, aspect: Fraction | None) -> np.ndarray:
    """The picture of a frame, uint8 (h, w, 3), as its player shows it.

    aspect: width / height of a pixel. The display matrix, nine numbers with 16 bits behind the point, sends a pixel at
    (x, y) to (a x + c y, b x + d y): telephones film lying down, and front cameras mirrored.
    """
    picture: np.ndarray = frame.to_ndarray(format="rgb24")
    if aspect and aspect != 1 and Fraction(1, 16) <= aspect <= 16:
        height, width = picture.shape[:2]
        picture = resize_image(np.ascontiguousarray(picture), (height, max(1, round(width * aspect))))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(int)
    lying = abs(b) + abs(c) > abs(a) + abs(d)
    picture, across, down = (picture.swapaxes(0, 1), c, b) if lying else (picture, a, d)
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


class FilmWriter:
    """Encodes overlays into a file as H.264 in MP4; the first frame fixes the size of the picture."""

    def __init__(self, file: BinaryIO, target: Path, style: Style, rate: Fraction) -> None:
        self._file, self._target, self._style, self._rate = file, target, style, rate
        self._container: Any = None
        self.frames = 0  # that have been written
        self._canvas = np.empty((0, 0, 3), np.uint8)  # the legend, and room for the image

    def write(self, image: np.ndarray, labels: np.ndarray, time: Fraction) -> None:
        """Adds one frame: its picture uint8 (h, w, 3), its labels (h, w), and when it is shown, in seconds."""
        if self._container is None:
            self._open(image)
        height, width = image.shape[:2]
        if (height, width) != self._size:
            change = f"from {self._size[0]}x{self._size[1]} to {height}x{width}"
            raise DataError(f"{self._target}: frames change their size {change}; cut the video there")
        canvas = self._canvas.copy()
        canvas[:height, :width] = self._style.blend(image, labels)
        picture = pyav().VideoFrame.from_ndarray(canvas, format="rgb24")
        picture.pts, picture.time_base = round(time / _TICK), _TICK
        self._encode(picture)
        self.frames += 1

    def close(self) -> None:
        """Writes what the encoder still holds, and the end of the file."""
        self._encode(None)
        with self._errors():
            self._container.close()

    def _encode(self, picture: Any) -> None:
        with self._errors():
            self._container.mux(self._stream.encode(picture))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (pyav().error.FFmpegError, OSError) as error:
            raise DataError(f"{self._target}: could not be written: {reason(error)}") from error

    def _open(self, image: np.ndarray) -> None:
        self._size = image.shape[:2]
        key = self._style.legend(range(len(self._style.names)), image.shape[1])
        picture = above(Image.fromarray(image), key)
        # The encoder halves the resolution of colours, so it takes even sizes only.
        canvas = Image.new("RGB", (picture.width + picture.width % 2, picture.height + picture.height % 2), "white")
        canvas.paste(picture, (0, 0))
        self._canvas = np.array(canvas)
        self._container = pyav().open(self._file, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=self._rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = canvas.width, canvas.height, "yuv420p"
        self._stream.codec_context.time_base = _TICK


@contextmanager
def opened_film(video: Video) -> Iterator[Film]:
    """A film in a file, or a camera; DataError where it cannot be read.

    A file is opened here and not by its name, which for FFmpeg may look like an address (`a:b.mp4`) or be no UTF-8.
    """
    av = pyav()
    options = {"framerate": str(_CAMERA_RATE)} if video.format == "avfoundation" else {}
    with ExitStack() as stack:
        try:
            source = video.location if video.path is None else stack.enter_context(video.path.open("rb"))
            container = stack.enter_context(av.open(source, format=video.format, options=options))
        except (av.error.FFmpegError, OSError) as error:
            expected = "a video that FFmpeg reads; convert it, or copy it again"
            if video.path is None:
                expected = f"a camera at {video.location}; connect one or name another, camera:1"
            raise DataError(f"{video.name}: {error.strerror or error}; expected {expected}") from error
        yield Film(container, video.name)


@dataclass(frozen=True)
class VideoPrediction:
    """The overlay video of a source."""

    source: str
    overlay: Path
    frames: int
    frames_per_second: float  # at which frames were read, segmented and written
    network_frames_per_second: float  # that the network alone would have had, on the device's clock
    interrupted: bool  # by Ctrl-C; the video holds the frames up to there
    problem: str = ""  # what was wrong with the source, or ended it early


def find_video(argument: str) -> Video | None:
    """The video or camera that an argument of the command line means; None where it means something else.

    `camera` and `camera:0` are the first camera, `camera:1` the second one. A file of such a name comes first.
    """
    path = Path(argument)
    if (camera := _CAMERA.fullmatch(argument)) and not path.exists():
        return camera_video(int(camera[1] or 0))
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return Video(str(path), path.stem, str(path), path=path)
    return None


def camera_video(number: int) -> Video:
    """The camera of a number, as this system names it."""
    location, interface = (str(number), "avfoundation") if sys.platform == "darwin" else (f"/dev/video{number}", "v4l2")
    return Video(f"camera {number}", f"camera{number}", location, interface)


def plan_videos(videos: Sequence[Video], out: Path) -> list[Path]:
    """The files that will be written. DataError where they would overwrite one another or a source."""
    if videos:
        pyav()
    names = [video.path or Path(video.stem) for video in videos]
    return [files["overlay"] for files in plan_targets(names, out, {"overlay": "_overlay.mp4"})]


def predict_video(
    segmenter: Segmenter,
    video: Video,
    target: Path,
    style: Style,
    limit: int | None = None,
    watch: Callable[[int, int, float], None] = lambda done, frames, rate: None,
) -> VideoPrediction:
    """Writes a video (H.264 in MP4, no sound) of the frames with class colours over them and a legend of all classes.

    It ends with the source, after `limit` frames, by Ctrl-C, or where the source breaks off; what there is by then is
    kept, and `problem` says why. Threads decode, resize, draw and encode beside the network. `watch` is told frames
    done, frames in all (0: not known) and frames per second. The file appears when it is complete. DataError for a
    source of which nothing can be read, or where nothing can be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    interrupted, rate, problem = False, 0.0, ""
    try:
        with (
            opened_film(video) as film,
            atomic_file(target) as descriptor,
            open(descriptor, "wb", closefd=False) as file,
        ):
            writer = FilmWriter(file, target, style, film.rate)

            def write(result: Segmented[Fraction]) -> int:
                time, image, found = result
                writer.write(image, found.labels, time)
                return writer.frames

            before, began = (segmenter.images, segmenter.seconds), perf_counter()
            try:
                with (
                    closing(in_background(islice(film.frames(), limit), _AHEAD)) as frames,
                    closing(segmenter.stream(frames, lambda frame: (frame[1], frame[0]))) as results,
                    closing(ordered_map(write, results, 1, _AHEAD)) as written,
                ):
                    for done in written:
                        rate = done / (perf_counter() - began)
                        watch(done, limit or film.length, rate)
            except KeyboardInterrupt:
                interrupted = True
            except (SegnetError, MemoryError) as error:
                if not writer.frames:
                    raise
                short = f"memory is short after {writer.frames} frames; end other programs"
                problem = str(error) or f"{video.name}: {short}"
            if interrupted and not writer.frames:
                raise KeyboardInterrupt
            if not writer.frames:
                raise DataError(f"{video.name}: not one frame could be read; copy the file from the source again")
            if film.damaged and not problem:
                problem = f"{video.name}: {film.damaged} packets are damaged and were passed over"
            writer.close()
    except OSError as error:
        raise DataError(f"{target}: could not be written: {reason(error)}") from error
    alone = (segmenter.images - before[0]) / (segmenter.seconds - before[1])
    return VideoPrediction(video.name, target, writer.frames, rate, alone, interrupted, problem)
