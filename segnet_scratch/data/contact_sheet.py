"""A contact sheet of a data set: each image with its boxes, beside it its mask in colours, below all a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segnet_scratch.data.annotations import ObjectBox, annotation_file, read_annotation
from segnet_scratch.data.drawing import Style
from segnet_scratch.data.transforms import resize_image, resize_mask
from segnet_scratch.data.voc import VOCDataset
from segnet_scratch.errors import DataError

# More images than this on one sheet are refused: it would be larger than picture viewers open.
MAX_COUNT = 400

_PANEL = 240  # longest side of a picture on the sheet
_GAP, _LINE = 8, 18
_OPACITY = 0.6  # of the class colours over the grey image
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices, evenly spread, so that a sheet shows all of a split rather than its beginning."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()


def contact_sheet(dataset: VOCDataset, indices: Sequence[int]) -> Image.Image:
    """The samples `indices` of a data set on one RGB picture.

    Boxes and names are drawn where there is a file in Annotations. Colours are those of `dataset.palette`; label 0
    stays uncoloured where it is called background, void is opaque. Raises DataError for a file that cannot be read,
    and for no or more than MAX_COUNT samples.
    """
    if not 0 < len(indices) <= MAX_COUNT:
        raise DataError(f"contact sheet of {len(indices)} images: expected 1 to {MAX_COUNT}; choose some of them.")
    style = Style(dataset.names, dataset.palette[: dataset.classes].tolist(), _OPACITY)
    cells, present = [], set()
    for index in indices:
        image, mask, name = dataset.sample(index)
        path = annotation_file(dataset.root, name)
        objects = read_annotation(path).objects if path.is_file() else ()
        cells.append(_cell(image, mask, name, objects, style))
        present |= {*np.unique(mask).tolist()}
    columns = max(1, min(len(cells), round((len(cells) / 2) ** 0.5)))  # a cell is about twice as wide as high
    step = cells[0].width + _GAP
    heights = [max(cell.height for cell in cells[k : k + columns]) + _GAP for k in range(0, len(cells), columns)]
    tops = np.cumsum([_GAP, *heights]).tolist()
    key = style.legend(sorted(present), columns * step + _GAP)
    sheet = Image.new("RGB", (columns * step + _GAP, tops[-1] + key.height), _PAPER)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (_GAP + column * step, tops[row]))
    sheet.paste(key, (0, tops[-1]))
    return sheet


def _cell(image: np.ndarray, mask: np.ndarray, name: str, objects: Sequence[ObjectBox], style: Style) -> Image.Image:
    """The id above image and mask, side by side."""
    scale = _PANEL / max(mask.shape)
    height, width = (max(1, round(side * scale)) for side in mask.shape)
    small, labels = resize_image(image, (height, width)), resize_mask(mask, (height, width))
    cell = Image.new("RGB", (2 * _PANEL + 2, height + _LINE), _PAPER)
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(size=12)
    title = f"{name}   {mask.shape[1]} x {mask.shape[0]} px"
    while font.getlength(title) > cell.width and len(title) > 1:
        title = title[:-1]
    draw.text((0, 1), title, fill=_INK, font=font)
    photo = Image.fromarray(small)
    _draw_boxes(photo, objects, scale, style)
    cell.paste(photo, (0, _LINE))
    cell.paste(Image.fromarray(style.blend(small, labels)), (_PANEL + 2, _LINE))
    return cell


def _draw_boxes(picture: Image.Image, objects: Sequence[ObjectBox], scale: float, style: Style) -> None:
    """Boxes in the colours of their classes; then the names, so that no box crosses one."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    tags = []
    for thing in objects:
        # VOC counts from 1 with both ends inside, so a box covers left - 1 to right in lengths.
        left, top, right, bottom = ((side - shift) * scale for side, shift in zip(thing.box, (1, 1, 0, 0), strict=True))
        known = thing.name in style.names
        colour = tuple(style.palette[style.names.index(thing.name)].tolist()) if known else _PAPER
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        tags.append((left, top, thing.name + (" (difficult)" if thing.difficult else ""), colour))
    for left, top, text, colour in tags:
        # Inside the picture, wherever the box lies.
        width, height = int(font.getlength(text)) + 4, 13
        x, y = max(0, min(left, picture.width - width)), max(0, min(top, picture.height - height))
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        luma = np.dot(colour, (0.299, 0.587, 0.114))  # of ITU-R BT.601
        draw.text((x + 2, y), text, fill=_INK if luma > 120 else _PAPER, font=font)
