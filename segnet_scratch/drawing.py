"""Pictures of segmentations: class colours over the image, legends, uncertainty as a heat map."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segnet_scratch.data import voc_palette

_OPACITY = 0.55  # of the class colours over the image
_MARGIN, _SQUARE, _LINE = 4, 10, 16  # of a legend, in pixels

# From black over violet and orange to a pale yellow, ever brighter, so that it reads in grey too.
_HEAT = np.array([(0, 0, 4), (66, 14, 104), (148, 40, 100), (221, 81, 58), (252, 165, 10), (252, 255, 190)], float)


def overlay(image: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The image uint8 (h, w, 3) with its labels (h, w) as `blend` paints them, and below it the classes that occur."""
    present = [k for k in np.unique(labels).tolist() if k < len(names)]
    return above(Image.fromarray(blend(image, labels)), legend([(names[k], k) for k in present], image.shape[1]))


def blend(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The image, uint8 (h, w, 3), with every class but the first (the background) in its palette colour."""
    # Coloured over grey: over the image's own colours the palette's could not be told apart.
    grey = image.mean(axis=2, keepdims=True)
    mixed = np.where((labels > 0)[..., None], (1 - _OPACITY) * grey + _OPACITY * voc_palette()[labels], image)
    return np.rint(mixed).astype(np.uint8)


def legend(entries: Sequence[tuple[str, int]], width: int) -> Image.Image:
    """Rows of coloured squares with class names, as many beside each other as the width takes, at least one.

    `entries` are (name, label). The picture is `width` pixels wide, or as wide as the longest name needs.
    """
    font = ImageFont.load_default(size=12)
    # The name of a class stays readable below an image that is narrower than it.
    width = max([width, *(2 * _MARGIN + _SQUARE + 4 + int(font.getlength(name)) for name, _ in entries)])
    positions, x, y = [], _MARGIN, _MARGIN
    for name, _ in entries:
        needed = _SQUARE + 4 + int(font.getlength(name)) + 10
        if x > _MARGIN and x + needed > width:
            x, y = _MARGIN, y + _LINE
        positions.append((x, y))
        x += needed
    picture = Image.new("RGB", (width, y + _LINE), "white")
    draw = ImageDraw.Draw(picture)
    for (name, index), (left, top) in zip(entries, positions, strict=True):
        colour = tuple(int(c) for c in voc_palette()[index])
        draw.rectangle((left, top, left + _SQUARE, top + _SQUARE), fill=colour, outline="black")
        draw.text((left + _SQUARE + 4, top - 2), name, fill="black", font=font)
    return picture


def heat_map(values: np.ndarray, what: str) -> Image.Image:
    """Values (h, w), none negative, from black (0) to pale yellow (the largest), above a colour bar that names them."""
    largest = float(values.max())
    picture = Image.fromarray(heat_colours(values / (largest or 1)))
    font = ImageFont.load_default(size=12)
    first, last = f"{what}: 0", f"{largest:.2g}"
    width = max(picture.width, 2 * _MARGIN + int(font.getlength(first) + font.getlength(last)) + 80)
    bar = Image.new("RGB", (width, _SQUARE + 2 * _MARGIN), "white")
    left = 2 * _MARGIN + int(font.getlength(first))
    right = width - 2 * _MARGIN - int(font.getlength(last))
    draw = ImageDraw.Draw(bar)
    draw.text((_MARGIN, 1), first, fill="black", font=font)
    draw.text((right + _MARGIN, 1), last, fill="black", font=font)
    ramp = np.broadcast_to(np.linspace(0, 1, right - left), (_SQUARE, right - left))
    bar.paste(Image.fromarray(heat_colours(ramp)), (left, _MARGIN))
    return above(picture, bar)


def heat_colours(fractions: np.ndarray) -> np.ndarray:
    """Colours uint8 (..., 3) of fractions 0 to 1."""
    anchors = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(fractions, anchors, _HEAT[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures as one, on white."""
    combined = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    combined.paste(upper, (0, 0))
    combined.paste(lower, (0, upper.height))
    return combined
