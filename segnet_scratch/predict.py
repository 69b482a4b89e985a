"""Prediction: an indexed PNG and an overlay with a legend for each image at its own size; on request the arrays."""

import errno
import glob
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np

from segnet_scratch.data import indexed_picture, ordered_map, read_image
from segnet_scratch.data.drawing import Style, heat_map
from segnet_scratch.data.palette import png_bytes
from segnet_scratch.data.pictures import label_counts, picture_bytes
from segnet_scratch.errors import DataError, DeviceMemoryError
from segnet_scratch.files import left_by_system, real, reason, visible_files, write_durably
from segnet_scratch.inference import BYTES_AHEAD, Segmentation, Segmented, Segmenter

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# What the names of an image's files end in, by what they hold.
_ENDINGS = {"labels": ".png", "overlay": "_overlay.png", "logits": ".npy"}
_ENDINGS |= {"uncertainty": "_uncertainty.png", "uncertainty_array": "_uncertainty.npy"}


@dataclass(frozen=True)
class Prediction:
    """The files written for one image, by what they hold, and the share of its pixels that each class has.

    Where the image could not be read there are none, and `problem` says why.
    """

    image: Path
    files: dict[str, Path]
    shares: dict[str, float] = field(default_factory=dict)
    problem: str = ""


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The files that a user means: files as they are, the images of a folder, what a pattern such as `*.jpg` matches.

    Sorted within a folder or pattern; what is named twice comes once. DataError for a path that does not exist, a
    folder without images, a pattern that matches nothing.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            images = [file for file in visible_files(path) if file.suffix.lower() in IMAGE_SUFFIXES]
            if not images:
                expected = f"files that end in {', '.join(IMAGE_SUFFIXES)}; folders below it are not searched"
                raise DataError(f"{path}: no images in this folder; expected {expected}")
            found += images
        elif path.exists():  # before patterns: a name may hold brackets
            found.append(path)
        else:
            names = glob.glob(argument, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
            matches = sorted(name for name in map(Path, names) if name.is_file() and not left_by_system(name.name))
            if not matches:
                pattern = ", and as a pattern it matches none" if glob.has_magic(argument) else ""
                raise DataError(f"{path}: no such file{pattern}; check the path")
            found += matches
    return list(dict.fromkeys(found))


def predict_files(
    segmenter: Segmenter, images: Sequence[Path], out: Path, style: Style, with_logits: bool = False
) -> Iterator[Prediction]:
    """Writes `NAME.png` (indexed, palette of the style) and `NAME_overlay.png` into `out` for each image.

    With samples also `NAME_uncertainty.png`; with logits `NAME.npy`, float32 (height, width, classes), at the image's
    own size (`Segmentation`), and `NAME_uncertainty.npy`, float32 (height, width). Each file appears whole or not at
    all. NAME is that of the image without its suffix, or with it where results would have the same name. A file that is
    no image is a Prediction with a problem, and the others go on. Threads read and write beside the network, of large
    images one at a time. DataError, before anything is written, for an image that does not exist, and where a result
    would overwrite another result or one of the images; later where a file cannot be written.
    """
    if missing := [path for path in images if not path.is_file()]:
        problem = "is a folder; name the images in it" if missing[0].is_dir() else "no such file; check the path"
        others = f" (and {len(missing) - 1} more of {len(images)} images)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: {problem}{others}")
    absent = set() if with_logits else {"logits", "uncertainty_array"}
    absent |= set() if segmenter.inference.samples else {"uncertainty", "uncertainty_array"}
    targets = plan_targets(images, out, {kind: end for kind, end in _ENDINGS.items() if kind not in absent})
    out.mkdir(parents=True, exist_ok=True)

    def load(job: Prediction) -> tuple[Prediction, np.ndarray]:
        try:
            return job, read_image(job.image, for_prediction=True)
        except DataError as error:  # goes the way of all the others
            return Prediction(job.image, {}, problem=str(error)), np.zeros((1, 1, 3), np.uint8)

    def write(result: Segmented[Prediction]) -> Prediction:
        job, image, found = result
        if job.problem:
            return job
        try:
            for kind, file in job.files.items():
                write_durably(file, [_content(kind, image, found, style)])
        except OSError as error:
            problem = f"{error.filename}: could not be written: {reason(error)}"
            if error.errno != errno.ENAMETOOLONG:
                raise DataError(problem) from error
            return Prediction(job.image, {}, problem=problem)
        counts = label_counts(found.labels)
        order = np.argsort(-counts[: len(style.names)], kind="stable")
        return replace(job, shares={style.names[k]: float(counts[k] / found.labels.size) for k in order if counts[k]})

    jobs = [Prediction(path, files) for path, files in zip(images, targets, strict=True)]
    ahead = segmenter.workers, _bytes_of, BYTES_AHEAD
    while jobs:
        results = segmenter.stream(jobs, load, weigh=lambda job: picture_bytes(job.image), with_logits=with_logits)
        try:
            with closing(results), closing(ordered_map(write, results, segmenter.workers, *ahead)) as predictions:
                for prediction in predictions:
                    jobs = jobs[1:]
                    yield prediction
        except (DeviceMemoryError, MemoryError) as error:  # the others go on
            short = "memory is too short for this image; pass --window, a smaller --size, or end other programs"
            yield Prediction(jobs[0].image, {}, problem=str(error) or f"{jobs[0].image}: {short}")
            jobs = jobs[1:]


def _bytes_of(result: Segmented[Prediction]) -> int:
    _, image, found = result
    arrays = image, found.labels, found.logits, found.uncertainty
    return sum(array.nbytes for array in arrays if array is not None)


def plan_targets(sources: Sequence[Path], out: Path, endings: Mapping[str, str]) -> list[dict[str, Path]]:
    """The files to be made of each source, by what they hold: in `out`, its name without suffix plus each ending.

    Sources whose files would be called the same, on any file system, keep their suffix. DataError where a file would
    still overwrite another one, or a source.
    """
    often = Counter(_same_anywhere(path.stem + ending) for path in sources for ending in endings.values())
    inputs = {real(path) for path in sources}
    made_from: dict[str, Path] = {}
    targets = []
    for path in sources:
        clashes = any(often[_same_anywhere(path.stem + ending)] > 1 for ending in endings.values())
        name = path.name if clashes else path.stem
        targets.append({kind: out / f"{name}{ending}" for kind, ending in endings.items()})
        for target in targets[-1].values():
            if real(target) in inputs:
                raise DataError(f"{target}: the result for {path} would overwrite this file; choose another --out")
            if other := made_from.get(_same_anywhere(target.name)):
                both = f"{other} and {path} would both be written there"
                raise DataError(f"{target}: {both}; predict them into separate folders")
            made_from[_same_anywhere(target.name)] = path
    return targets


def _same_anywhere(name: str) -> str:
    """A form that two names share where some file system takes them for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _content(kind: str, image: np.ndarray, found: Segmentation, style: Style) -> bytes:
    """The bytes of one file: one at a time, since those of a large image are large."""
    match kind:
        case "labels":
            return png_bytes(indexed_picture(found.labels, style.palette))
        case "overlay":
            return png_bytes(style.overlay(image, found.labels))
        case "uncertainty":
            return png_bytes(heat_map(cast(np.ndarray, found.uncertainty), "variance"))
    buffer = BytesIO()
    np.save(buffer, cast(np.ndarray, found.logits if kind == "logits" else found.uncertainty))
    return buffer.getvalue()
