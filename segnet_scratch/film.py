"""Films and cameras as PyAV reads them: every frame upright, in square pixels, with a time later than the last one's.

What cameras, telephones and converters write seldom is what the formats promise: mirrored pictures, covers, times that
stand still or jump, broken packets. Players show such films, so they are read here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from segnet_scratch.data import resize_image
from segnet_scratch.data.drawing import Style, above
from segnet_scratch.errors import DataError
from segnet_scratch.extras import require
from segnet_scratch.files import reason

_CAMERA_RATE = 30
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC of FFmpeg
_TICK = Fraction(1, 90_000)  # of the films that are written: MPEG's clock, finer than any frame rate
_REORDERED = 4  # frames, at most, that a time is earlier by where it is only mistaken; more begins another recording


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
def opened_film(name: str, path: Path | None, location: str = "", interface: str | None = None) -> Iterator[Film]:
    """A film in a file, or a camera by its location and the interface of the system; DataError where it cannot be read.

    A file is opened here and not by its name, which for FFmpeg may look like an address (`a:b.mp4`) or be no UTF-8.
    """
    av = pyav()
    options = {"framerate": str(_CAMERA_RATE)} if interface == "avfoundation" else {}
    with ExitStack() as stack:
        try:
            source = location if path is None else stack.enter_context(path.open("rb"))
            container = stack.enter_context(av.open(source, format=interface, options=options))
        except (av.error.FFmpegError, OSError) as error:
            expected = "a video that FFmpeg reads; convert it, or copy it again"
            if path is None:
                expected = f"a camera at {location}; connect one or name another, camera:1"
            raise DataError(f"{name}: {error.strerror or error}; expected {expected}") from error
        yield Film(container, name)
