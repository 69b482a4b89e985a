"""Prediction: an indexed PNG, an overlay with a legend, and on request the logits, for each image at its own size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segnet_scratch.autograd import no_grad
from segnet_scratch.checkpoint import write_durably
from segnet_scratch.data import indexed_picture, normalise, read_image, resize_image, voc_palette
from segnet_scratch.errors import DataError
from segnet_scratch.evaluate import classify, resize
from segnet_scratch.segnet import SegNet

_OPACITY = 0.55  # of the class colours over the image
_ENDINGS = (".png", "_overlay.png", ".npy")  # of the files of one image


@dataclass(frozen=True)
class Prediction:
    """The files written for one image and the share of its pixels that each class has."""

    image: Path
    labels: Path
    overlay: Path
    logits: Path | None
    shares: dict[str, float]


def predict_files(
    model: SegNet,
    images: Sequence[Path],
    out: Path,
    size: tuple[int, int],
    names: Sequence[str],
    with_logits: bool = False,
) -> Iterator[Prediction]:
    """Writes `NAME.png` (indexed, VOC palette), `NAME_overlay.png` and, if asked, `NAME.npy` into `out` for each image.

    `NAME.npy` holds the logits, float32 (height, width, classes), at the image's own size. Each file appears whole or
    not at all. DataError, before anything is written, for an image that does not exist, and where a result would
    overwrite another result or one of the images; and for a file that is no image, when its turn has come.
    """
    endings = _ENDINGS if with_logits else _ENDINGS[:2]
    targets = [[out / f"{path.stem}{ending}" for ending in endings] for path in images]
    _check_files(images, targets)
    out.mkdir(parents=True, exist_ok=True)
    for path, files in zip(images, targets, strict=True):
        image = read_image(path, for_prediction=True)
        labels, logits = predict(model, image, size, with_logits)
        contents = [_png(indexed_picture(labels)), _png(overlay(image, labels, names))]
        if logits is not None:
            contents.append(_npy(logits))
        for file, content in zip(files, contents, strict=True):
            write_durably(file, [content])
        counts = np.bincount(labels.reshape(-1), minlength=len(names))
        shares = {names[k]: float(counts[k] / labels.size) for k in np.argsort(-counts) if counts[k]}
        yield Prediction(path, files[0], files[1], files[2] if with_logits else None, shares)


def _check_files(images: Sequence[Path], targets: Sequence[Sequence[Path]]) -> None:
    """DataError where an image is missing, or a result would overwrite another one or an image."""
    missing = [path for path in images if not path.is_file()]
    if missing:
        problem = "is a folder; name the images in it" if missing[0].is_dir() else "no such file; check the path"
        others = f" (and {len(missing) - 1} more of {len(images)} images)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: {problem}{others}")
    inputs = {path.resolve() for path in images}
    made_from: dict[Path, Path] = {}
    for path, files in zip(images, targets, strict=True):
        for target in files:
            if target.resolve() in inputs:
                raise DataError(f"{target}: the result for {path} would overwrite this image; choose another --out")
            if target in made_from:
                raise DataError(
                    f"{target}: {made_from[target]} and {path} would both be written there; predict them into separate "
                    "folders"
                )
            made_from[target] = path


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def predict(
    model: SegNet, image: np.ndarray, size: tuple[int, int], with_logits: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels uint8 (h, w), and logits float32 (h, w, classes) if asked, of an RGB image uint8 (h, w, 3).

    The network sees the image at `size`; its logits are resized to the image. The model must be in evaluation mode.
    """
    with no_grad():
        logits = model(normalise(resize_image(image, size))[None]).data
        own_size = image.shape[:2]
        labels = model.device.download(classify(model, logits, own_size))[0]
        if not with_logits:
            return labels, None
        return labels, model.device.download(resize(model, logits, own_size))[0]


def overlay(image: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The image with every class but the first (the background) in its palette colour, and a legend below."""
    # Coloured over grey: over the image's own colours the palette's could not be told apart.
    grey = image.mean(axis=2, keepdims=True)
    colours = voc_palette()[labels]
    mixed = np.where((labels > 0)[..., None], (1 - _OPACITY) * grey + _OPACITY * colours, image)
    picture = Image.fromarray(np.rint(mixed).astype(np.uint8))
    present = [k for k in np.unique(labels) if k < len(names)]
    legend = _legend([(names[k], k) for k in present], picture.width)
    combined = Image.new("RGB", (legend.width, picture.height + legend.height), "white")
    combined.paste(picture, (0, 0))
    combined.paste(legend, (0, picture.height))
    return combined


def _legend(entries: Sequence[tuple[str, int]], width: int) -> Image.Image:
    """Rows of coloured squares with class names, as many beside each other as the width takes, at least one."""
    font = ImageFont.load_default(size=12)
    margin, square, line = 4, 10, 16
    # The name of a class stays readable below an image that is narrower than it.
    width = max([width, *(2 * margin + square + 4 + int(font.getlength(name)) for name, _ in entries)])
    positions, x, y = [], margin, margin
    for name, _ in entries:
        needed = square + 4 + int(font.getlength(name)) + 10
        if x > margin and x + needed > width:
            x, y = margin, y + line
        positions.append((x, y))
        x += needed
    legend = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(legend)
    for (name, index), (left, top) in zip(entries, positions, strict=True):
        colour = tuple(int(c) for c in voc_palette()[index])
        draw.rectangle((left, top, left + square, top + square), fill=colour, outline="black")
        draw.text((left + square + 4, top - 2), name, fill="black", font=font)
    return legend
