"""Pictures of segmentations: class colours over the image, legends, uncertainty as a heat map."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any, Self

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segnet_scratch.data.palette import VOID, class_palette, has_background, png_bytes
from segnet_scratch.data.pictures import label_counts

_MARGIN, _SQUARE, _LINE = 4, 10, 16  # of a legend, in pixels

# From black over violet and orange to a pale yellow, ever brighter, so that it reads in grey too.
_HEAT = np.array([(0, 0, 4), (66, 14, 104), (148, 40, 100), (221, 81, 58), (252, 165, 10), (252, 255, 190)], float)


@dataclass(frozen=True)
class Style:
    """How the labels of a data set or network are drawn.

    names: of the classes, by label. colours: (red, green, blue) of each class; as `class_palette` finds unless given.
    opacity: of the colours over the image, 0 to 1.
    """

    names: Sequence[str]
    colours: Sequence[Sequence[int]] | None = None
    opacity: float = 0.55

    @classmethod
    def of(cls, metadata: Mapping[str, Any], classes: int, opacity: float = 0.55) -> Self:
        """That of a network of so many classes, as far as the metadata of its checkpoint tells."""
        names = metadata.get("classes") or [f"class {k}" for k in range(classes)]
        return cls(names, metadata.get("colours"), opacity)

    @cached_property
    def palette(self) -> np.ndarray:
        """The colour of every label, uint8 (256, 3)."""
        return class_palette(self.names, self.colours)

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """For every label its part of a mixed pixel, (256, 3), and the share that is left to the image, (256, 1)."""
        opacity = np.full((256, 1), self.opacity, np.float32)
        opacity[VOID] = 1  # stands out
        if has_background(self.names):
            opacity[0] = 0
        return opacity * self.palette, 1 - opacity

    def blend(self, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The image, uint8 (h, w, 3), with every class but a background in its colour, and void opaque."""
        colours, shares = self._tables
        mixed = np.empty_like(image)
        for rows in row_blocks(image.shape):
            # Coloured over grey: over the image's own colours the palette's could not be told apart.
            left, part = shares[labels[rows]], image[rows].astype(np.float32)
            under = np.where(left == 1, part, part.mean(axis=2, keepdims=True))
            mixed[rows] = np.rint(left * under + colours[labels[rows]])
        return mixed

    def legend(self, labels: Sequence[int], width: int) -> Image.Image:
        """Rows of coloured squares with the names of classes, and void, as many beside each other as the width takes.

        The picture is `width` pixels wide, or as wide as the longest name needs, which stays readable below an image
        that is narrower than it.
        """
        named = dict(enumerate(self.names)) | {VOID: "void"}
        entries = [(named[k], tuple(self.palette[k].tolist())) for k in labels if k in named]
        font = ImageFont.load_default(size=12)
        widths = [_SQUARE + 4 + int(font.getlength(name)) for name, _ in entries]
        width = max([width, *(2 * _MARGIN + needed for needed in widths)])
        places, x, y = [], _MARGIN, _MARGIN
        for needed in widths:
            if x > _MARGIN and x + needed + 10 > width:
                x, y = _MARGIN, y + _LINE
            places.append((x, y))
            x += needed + 10
        picture = Image.new("RGB", (width, y + _LINE), "white")
        draw = ImageDraw.Draw(picture)
        for (name, colour), (left, top) in zip(entries, places, strict=True):
            draw.rectangle((left, top, left + _SQUARE, top + _SQUARE), fill=colour, outline="black")
            draw.text((left + _SQUARE + 4, top - 2), name, fill="black", font=font)
        return picture

    def overlay(self, image: np.ndarray, labels: np.ndarray) -> Image.Image:
        """The image uint8 (h, w, 3) with its labels (h, w) as `blend` paints them; below it the classes that occur."""
        present = np.flatnonzero(label_counts(labels)).tolist()
        return above(Image.fromarray(self.blend(image, labels)), self.legend(present, image.shape[1]))


def row_blocks(shape: tuple[int, ...], pixels: int = 1 << 20) -> Iterator[slice]:
    """The rows of a picture (h, w, ...) in blocks of about so many pixels, to bound what is computed at a time."""
    step = max(1, pixels // max(1, shape[1]))
    return (slice(top, min(top + step, shape[0])) for top in range(0, shape[0], step))


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


def jpeg_uri(image: np.ndarray) -> str:
    """A photo, uint8 (h, w, 3), as a data URI."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def png_uri(picture: Image.Image) -> str:
    """A picture, without loss, as a data URI."""
    return f"data:image/png;base64,{b64encode(png_bytes(picture)).decode()}"
