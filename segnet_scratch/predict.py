"""Prediction: an indexed PNG, an overlay with a legend, and on request the logits, for each image at its own size."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segnet_scratch.autograd import no_grad
from segnet_scratch.data import normalise, read_image, resize_image, save_indexed_png, voc_palette
from segnet_scratch.errors import DataError
from segnet_scratch.evaluate import classify, resize
from segnet_scratch.segnet import SegNet

_OPACITY = 0.55  # of the class colours over the image


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

    `NAME.npy` holds the logits, float32 (height, width, classes), at the image's own size. DataError for a file that is
    no image, and for two images of one name, whose results would overwrite each other.
    """
    repeated = [name for name, count in Counter(path.stem for path in images).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} image names occur twice ({repeated[0]}, ...); predict them into separate folders"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in images:
        image = read_image(path, for_prediction=True)
        labels, logits = predict(model, image, size, with_logits)
        labels_path, overlay_path = out / f"{path.stem}.png", out / f"{path.stem}_overlay.png"
        save_indexed_png(labels_path, labels)
        overlay(image, labels, names).save(overlay_path)
        logits_path = None
        if logits is not None:
            logits_path = out / f"{path.stem}.npy"
            np.save(logits_path, logits)
        counts = np.bincount(labels.reshape(-1), minlength=len(names))
        shares = {names[k]: float(counts[k] / labels.size) for k in np.argsort(-counts) if counts[k]}
        yield Prediction(path, labels_path, overlay_path, logits_path, shares)


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
    combined = Image.new("RGB", (picture.width, picture.height + legend.height), "white")
    combined.paste(picture, (0, 0))
    combined.paste(legend, (0, picture.height))
    return combined


def _legend(entries: Sequence[tuple[str, int]], width: int) -> Image.Image:
    """Rows of coloured squares with class names, as many beside each other as the width takes."""
    font = ImageFont.load_default(size=12)
    margin, square, line = 4, 10, 16
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
