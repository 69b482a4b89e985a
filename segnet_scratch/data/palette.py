"""Class numbers as colours, VOC's and others, and label maps as indexed PNG files."""

from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from segnet_scratch.errors import DataError
from segnet_scratch.files import reason
from segnet_scratch.ops.op import VOID as VOID

VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
               "tvmonitor")  # fmt: skip

# What people call the class of all that is nothing in particular, in lower case.
BACKGROUND_NAMES = ("background", "_background_", "__background__", "bg")


def has_background(names: Sequence[str]) -> bool:
    """Whether label 0 means nothing in particular, so that pictures leave it uncoloured."""
    return bool(names) and names[0].lower() in BACKGROUND_NAMES


def class_palette(names: Sequence[str], colours: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """The colour of every label, uint8 (256, 3), for classes of these names.

    The first ones are `colours`, (red, green, blue) of each class, where they are known; else VOC's where the classes
    are VOC's, else colours chosen to be told apart. The others are VOC's, which void (255) keeps in any case.
    """
    palette = voc_palette()
    if colours is not None:
        palette[: len(names)] = colours
    elif tuple(names) != VOC_CLASSES:
        palette[: len(names)] = distinct_colours(len(names), has_background(names))
    return palette


@cache
def distinct_colours(count: int, background: bool) -> np.ndarray:
    """Colours uint8 (count, 3) that are as far from one another as can be; the first black for a background.

    One after the other is taken that is farthest from all before it, and from the greys, over which overlays are
    drawn: in CIELAB, whose distances are those that people see, with half the weight on lightness, which in an overlay
    is the image's too.
    """
    steps = np.linspace(0, 255, 12).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    candidates = candidates[_lab(candidates)[:, 0] > 30]  # darker ones all look black
    lab = _lab(candidates) * (0.5, 1, 1)
    greys = _lab(np.repeat(np.linspace(0, 255, 9)[:, None], 3, axis=1)) * (0.5, 1, 1)
    nearest = np.min(np.linalg.norm(lab[:, None] - greys, axis=2), axis=1)
    chosen = [np.zeros(3)] if background else []
    while len(chosen) < count:
        best = int(np.argmax(nearest))
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=1))
    return np.array(chosen, np.uint8)


def _lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB (n, 3) of sRGB colours 0..255 (n, 3) for the white of D65 (IEC 61966-2-1 and CIE 15)."""
    linear = np.where(colours <= 0.04045 * 255, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz /= (0.9505, 1, 1.089)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def says_nothing(colours: np.ndarray, labels: Sequence[int]) -> bool:
    """Whether the colours of these labels, uint8 (n, 3), are greys, or VOC's, which programs write for want of any."""
    return bool((colours == colours[:, :1]).all() or (colours == voc_palette()[labels]).all())


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


def indexed_picture(
    labels: np.ndarray, palette: np.ndarray | None = None, where: str = "indexed_picture"
) -> Image.Image:
    """A label map, integers (H, W) in 0..255, as a picture of mode P; palette: uint8 (256, 3), VOC's unless given.

    Raises DataError, which begins with `where`, for anything but such a map.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels are integers, got {labels.dtype}; take the argmax of scores first.")
    if labels.ndim != 2 or labels.size == 0:
        raise DataError(f"{where}: a label map is (height, width), got shape {labels.shape}; save one at a time.")
    if labels.min() < 0 or labels.max() > 255:
        found = f"{labels.min()}..{labels.max()}"
        raise DataError(f"{where}: labels lie in 0..255, got {found}; mark pixels without a class as {VOID}.")
    picture = Image.fromarray(labels.astype(np.uint8, copy=False))
    picture.putpalette((voc_palette() if palette is None else palette).tobytes())
    return picture


def save_indexed_png(path: str | Path, labels: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Writes a label map, integers (H, W) in 0..255, as an 8-bit indexed PNG; palette: VOC's unless given.

    With VOC's this is the form that VOC's evaluation server takes and that `read_mask` reads back unchanged.
    Raises DataError for anything but such a map, and when the file cannot be written.
    """
    try:
        indexed_picture(labels, palette, str(path)).save(path, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {reason(error)}.") from error


def png_bytes(picture: Image.Image) -> bytes:
    """The content of a PNG file."""
    content = BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
