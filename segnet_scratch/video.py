"""Videos and cameras: every frame segmented and written as an overlay video, by PyAV (the extra `video`)."""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from time import perf_counter

from segnet_scratch.data import in_background, ordered_map
from segnet_scratch.data.drawing import Style
from segnet_scratch.errors import DataError, SegnetError
from segnet_scratch.files import reason, whole_file
from segnet_scratch.film import FilmWriter, opened_film, pyav
from segnet_scratch.inference import Segmented, Segmenter
from segnet_scratch.predict import plan_targets

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")
_AHEAD = 2  # frames that are decoded, and that wait to be encoded, while the network works
_CAMERA = re.compile(r"camera(?::(\d+))?")


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
            opened_film(video.name, video.path, video.location, video.format) as film,
            whole_file(target) as descriptor,
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
