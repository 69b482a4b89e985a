"""Prediction: an indexed PNG and an overlay with a legend for each image at its own size; on request the arrays."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from segnet_scratch.data import indexed_picture, read_image
from segnet_scratch.data.drawing import Style, heat_map
from segnet_scratch.data.folders import left_by_system, visible_files
from segnet_scratch.errors import DataError
from segnet_scratch.files import write_durably
from segnet_scratch.inference import Inference, Segmentation, segment
from segnet_scratch.segnet import SegNet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Prediction:
    """The files written for one image, by what they hold, and the share of its pixels that each class has."""

    image: Path
    files: dict[str, Path]
    shares: dict[str, float]


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
                raise DataError(
                    f"{path}: no images in this folder; expected files that end in {', '.join(IMAGE_SUFFIXES)}; "
                    "folders below it are not searched"
                )
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
    model: SegNet,
    images: Sequence[Path],
    out: Path,
    size: tuple[int, int],
    style: Style,
    with_logits: bool = False,
    inference: Inference | None = None,
) -> Iterator[Prediction]:
    """Writes `NAME.png` (indexed, palette of the style) and `NAME_overlay.png` into `out` for each image.

    With samples also `NAME_uncertainty.png`; with logits `NAME.npy`, float32 (height, width, classes), at the image's
    own size (`Segmentation`), and `NAME_uncertainty.npy`, float32 (height, width). Each file appears whole or not at
    all. DataError, before anything is written, for an image that does not exist, and where a result would overwrite
    another result or one of the images; and for a file that is no image, when its turn has come.
    """
    inference = inference or Inference()
    inference.check(model, size)
    targets = [_targets(out / path.stem, with_logits, inference.samples > 0) for path in images]
    check_targets(images, [list(files.values()) for files in targets])
    out.mkdir(parents=True, exist_ok=True)
    for path, files in zip(images, targets, strict=True):
        image = read_image(path, for_prediction=True)
        result = segment(model, image, size, inference, with_logits)
        contents = _contents(image, result, style)
        for kind, file in files.items():
            write_durably(file, [contents[kind]])
        counts = np.bincount(result.labels.reshape(-1), minlength=len(style.names))
        shares = {style.names[k]: float(counts[k] / result.labels.size) for k in np.argsort(-counts) if counts[k]}
        yield Prediction(path, files, shares)


def check_targets(sources: Sequence[Path], targets: Sequence[Sequence[Path]]) -> None:
    """DataError where a source is missing, or one of its targets would overwrite another target or a source."""
    missing = [path for path in sources if not path.is_file()]
    if missing:
        problem = "is a folder; name the images in it" if missing[0].is_dir() else "no such file; check the path"
        others = f" (and {len(missing) - 1} more of {len(sources)} images)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: {problem}{others}")
    inputs = {path.resolve() for path in sources}
    made_from: dict[Path, Path] = {}
    for path, files in zip(sources, targets, strict=True):
        for target in files:
            if target.resolve() in inputs:
                raise DataError(f"{target}: the result for {path} would overwrite this file; choose another --out")
            if target in made_from:
                raise DataError(
                    f"{target}: {made_from[target]} and {path} would both be written there; predict them into separate "
                    "folders"
                )
            made_from[target] = path


def _targets(stem: Path, with_logits: bool, with_uncertainty: bool) -> dict[str, Path]:
    """The files of one image by what they hold."""
    endings = {"labels": ".png", "overlay": "_overlay.png"}
    if with_logits:
        endings["logits"] = ".npy"
    if with_uncertainty:
        endings["uncertainty"] = "_uncertainty.png"
    if with_logits and with_uncertainty:
        endings["uncertainty_array"] = "_uncertainty.npy"
    return {kind: stem.with_name(stem.name + ending) for kind, ending in endings.items()}


def _contents(image: np.ndarray, result: Segmentation, style: Style) -> dict[str, bytes]:
    """The bytes of every file that can be written."""
    labels = result.labels
    contents = {"labels": _png(indexed_picture(labels, style.palette)), "overlay": _png(style.overlay(image, labels))}
    if result.logits is not None:
        contents["logits"] = _npy(result.logits)
    if result.uncertainty is not None:
        contents["uncertainty"] = _png(heat_map(result.uncertainty, "variance"))
        contents["uncertainty_array"] = _npy(result.uncertainty)
    return contents


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
