"""Videos and cameras: every frame segmented and written as an overlay video, by PyAV (the extra `video`)."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from segnet_scratch.data.drawing import Style, above
from segnet_scratch.errors import DataError
from segnet_scratch.extras import require
from segnet_scratch.files import temporary_beside
from segnet_scratch.inference import Inference, segment
from segnet_scratch.predict import check_targets
from segnet_scratch.segnet import SegNet

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")
_CAMERA = re.compile(r"camera(?::(\d+))?")
_CAMERA_RATE = 30


@dataclass(frozen=True)
class Video:
    """A video file or a camera: what the user calls it, and how libav opens it."""

    name: str
    stem: str  # of the file made from it
    location: str
    format: str | None = None  # of a camera, the interface of the system
    path: Path | None = None  # of a file

    @property
    def is_camera(self) -> bool:
        """Whether it goes on until it is stopped."""
        return self.path is None


@dataclass(frozen=True)
class VideoPrediction:
    """The overlay video of a source."""

    source: str
    overlay: Path
    frames: int
    frames_per_second: float  # at which frames were read, segmented and written
    interrupted: bool  # by Ctrl-C; the video holds the frames up to there


def find_video(argument: str) -> Video | None:
    """The video or camera that an argument of the command line means; None where it means something else.

    `camera` and `camera:0` are the first camera, `camera:1` the second one. A file of such a name comes first.
    """
    path = Path(argument)
    camera = _CAMERA.fullmatch(argument)
    if camera and not path.exists():
        number = camera[1] or "0"
        location, interface = (number, "avfoundation") if sys.platform == "darwin" else (f"/dev/video{number}", "v4l2")
        return Video(f"camera {number}", f"camera{number}", location, interface)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return Video(str(path), path.stem, str(path), path=path)
    return None


def plan_videos(videos: Sequence[Video], out: Path) -> list[Path]:
    """The files that will be written. DataError where they would overwrite one another or a source."""
    if videos:
        require("av", "video", "videos and cameras")
    targets = [out / f"{video.stem}_overlay.mp4" for video in videos]
    files = [(video.path, [target]) for video, target in zip(videos, targets, strict=True) if video.path is not None]
    check_targets([path for path, _ in files], [target for _, target in files])
    return targets


def predict_video(
    model: SegNet,
    video: Video,
    target: Path,
    size: tuple[int, int],
    style: Style,
    inference: Inference | None = None,
    limit: int | None = None,
    watch: Callable[[int, int, float], None] = lambda done, frames, rate: None,
) -> VideoPrediction:
    """Writes a video (H.264 in MP4, no sound) of the frames with class colours over them and a legend of all classes.

    It ends with the source, after `limit` frames, or by Ctrl-C; `watch` is told frames done, frames in all (0: not
    known) and frames per second. The file appears when it is complete. DataError for a source that cannot be read or
    holds no picture.
    """
    inference = inference or Inference()
    inference.check(model, size)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    done, interrupted, rate = 0, False, 0.0
    try:
        with _opened(video) as source, _Writer(temporary, target, video.name, style) as writer:
            began = perf_counter()
            try:
                for frame in source.decode(video=0):
                    image = _upright(frame)
                    writer.write(image, segment(model, image, size, inference).labels, frame, source)
                    done += 1
                    rate = done / (perf_counter() - began)
                    watch(done, limit or source.streams.video[0].frames, rate)
                    if done == limit:
                        break
            except KeyboardInterrupt:
                interrupted = True
        if not done:
            if interrupted:
                raise KeyboardInterrupt
            raise DataError(f"{video.name}: not one frame could be read; copy the file from the source again")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return VideoPrediction(video.name, target, done, rate, interrupted)


class _Writer:
    """Encodes frames into a file; the first one fixes the size of the picture."""

    def __init__(self, path: Path, target: Path, source: str, style: Style) -> None:
        self._av = require("av", "video", "videos and cameras")
        self._path, self._target, self._source, self._style = path, target, source, style
        self._container: Any = None
        self._start: int | None = None  # when the first frame is shown, in the time base of the source
        self._canvas = np.empty((0, 0, 3), np.uint8)  # the legend, and room for the image

    def __enter__(self) -> "_Writer":
        return self

    def write(self, image: np.ndarray, labels: np.ndarray, frame: Any, source: Any) -> None:
        """Adds one frame: its picture uint8 (h, w, 3), its labels (h, w), and when it is shown."""
        if self._container is None:
            self._open(image, source)
        height, width = image.shape[:2]
        if (height, width) != self._size:
            raise DataError(
                f"{self._source}: frames change their size from {self._size[0]}x{self._size[1]} to {height}x{width}; "
                "cut the video there"
            )
        canvas = self._canvas.copy()
        canvas[:height, :width] = self._style.blend(image, labels)
        picture = self._av.VideoFrame.from_ndarray(canvas, format="rgb24")
        if frame.pts is not None and frame.time_base is not None:
            # A camera's clock may have started at any time; a video begins at 0.
            self._start = frame.pts if self._start is None else self._start
            picture.pts, picture.time_base = frame.pts - self._start, frame.time_base
        self._encode(picture)

    def _encode(self, picture: Any) -> None:
        """A picture, or None for the end: what the encoder still holds."""
        try:
            self._container.mux(self._stream.encode(picture))
        except self._av.error.FFmpegError as error:
            raise DataError(
                f"{self._target}: could not be written: {error.strerror}; make room or choose another --out"
            ) from error

    def _open(self, image: np.ndarray, source: Any) -> None:
        self._size = image.shape[:2]
        key = self._style.legend(range(len(self._style.names)), image.shape[1])
        picture = above(Image.fromarray(image), key)
        # The encoder halves the resolution of colours, so it takes even sizes only.
        canvas = Image.new("RGB", (picture.width + picture.width % 2, picture.height + picture.height % 2), "white")
        canvas.paste(picture, (0, 0))
        self._canvas = np.array(canvas)
        original = source.streams.video[0]
        self._container = self._av.open(str(self._path), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=original.average_rate or Fraction(_CAMERA_RATE))
        self._stream.width, self._stream.height, self._stream.pix_fmt = canvas.width, canvas.height, "yuv420p"
        if original.time_base is not None:
            self._stream.codec_context.time_base = original.time_base

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._container is not None:
            if kind is None:
                self._encode(None)
            self._container.close()


@contextmanager
def _opened(video: Video) -> Iterator[Any]:
    """The source; whatever libav finds wrong with it, also later, becomes a DataError."""
    av = require("av", "video", "videos and cameras")
    try:
        options = {"framerate": str(_CAMERA_RATE)} if video.format == "avfoundation" else {}
        with av.open(video.location, format=video.format, options=options) as container:
            if not container.streams.video:
                raise DataError(f"{video.name}: holds no pictures; expected a video")
            container.streams.video[0].thread_type = "AUTO"
            yield container
    except av.error.FFmpegError as error:
        expected = f"expected a camera at {video.location}; connect one or name another, camera:1"
        fix = expected if video.is_camera else "expected a video that FFmpeg reads; convert it, or copy it again"
        raise DataError(f"{video.name}: {error.strerror or error}; {fix}") from error


def _upright(frame: Any) -> np.ndarray:
    """The picture of a frame, uint8 (h, w, 3), turned as its player would: telephones film lying down."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
