"""The VOC palette: class numbers as colours, and label maps as indexed PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image

from segnet_scratch.errors import DataError
from segnet_scratch.files import reason

VOID = 255
"""The label of pixels that belong to no class: object borders in VOC, padding in training crops."""

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def voc_palette() -> np.ndarray:
    """The colour of every label as the VOC devkit defines it (`VOClabelcolormap`): uint8 (256, 3), RGB.

    The bits of the label are dealt out in turn to red, green and blue, the lowest bits becoming the
    highest bits of the colours, so that neighbouring labels look different. Label 255 is (224, 224, 192).
    """
    labels = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for group in range(8):
        for channel in range(3):
            bit = (labels >> (3 * group + channel)) & 1
            palette[:, channel] |= (bit << (7 - group)).astype(np.uint8)
    return palette


def colourise(labels: np.ndarray) -> np.ndarray:
    """Colours of a label map: integers (..., H, W) in 0..255 -> uint8 (..., H, W, 3), RGB.

    Raises DataError for labels that are not integers in 0..255.
    """
    return voc_palette()[_as_bytes(labels, "colourise")]


def indexed_picture(labels: np.ndarray, where: str = "indexed_picture") -> Image.Image:
    """A label map, integers (H, W) in 0..255, as a picture of mode P with the VOC palette.

    Raises DataError, which begins with `where`, for anything but such a map.
    """
    labels = _as_bytes(labels, where)
    if labels.ndim != 2 or labels.size == 0:
        raise DataError(f"{where}: a label map is (height, width), got shape {labels.shape}; save one at a time.")
    picture = Image.fromarray(labels)
    picture.putpalette(voc_palette().tobytes())
    return picture


def save_indexed_png(path: str | Path, labels: np.ndarray) -> None:
    """Writes a label map, integers (H, W) in 0..255, as an 8-bit indexed PNG with the VOC palette.

    This is the form that VOC's evaluation server takes and that `read_mask` reads back unchanged.
    Raises DataError for anything but such a map, and when the file cannot be written.
    """
    picture = indexed_picture(labels, str(path))
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {reason(error)}.") from error


def _as_bytes(labels: np.ndarray, where: str) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels are integers, got {labels.dtype}; take the argmax of scores first.")
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise DataError(
            f"{where}: labels lie in 0..255, got {labels.min()}..{labels.max()}; mark pixels without a class as {VOID}."
        )
    return labels.astype(np.uint8, copy=False)
