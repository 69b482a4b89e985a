"""Tables of colours that stand for classes, and the labels of a picture by such a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segnet_scratch.data.palette import VOID, class_palette, voc_palette
from segnet_scratch.errors import DataError

Colour = tuple[int, int, int]
"""Red, green and blue, each 0..255."""

Found = tuple[int, int, int]
"""How many pixels have a colour, and the row and column of the first."""

VOID_NAMES = (
    "void",
    "unlabelled",
    "unlabeled",
    "ignore",
    "ignored",
    "unknown",
    "unannotated",
    "don't care",
    "dontcare",
)
"""What people call what belongs to no class, in lower case."""

# The 32 colours of CamVid's masks under the 11 classes that SegNet's authors and everybody since train on.
_CAMVID: Mapping[str, tuple[Colour, ...]] = {
    "sky": ((128, 128, 128),),
    "building": (
        (128, 0, 0),
        (0, 128, 64),  # bridge
        (64, 192, 0),  # wall
        (64, 0, 64),  # tunnel
        (192, 0, 128),  # archway
    ),
    "pole": ((192, 192, 128), (0, 0, 64)),  # column or pole, traffic cone
    "road": ((128, 64, 128), (128, 0, 192), (192, 0, 64)),  # road, lane markings to drive on and others
    "pavement": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),  # sidewalk, parking block, road shoulder
    "tree": ((128, 128, 0), (192, 192, 0)),  # tree, other vegetation
    "sign_symbol": ((192, 128, 128), (128, 128, 64), (0, 64, 64)),  # sign, other text, traffic light
    "fence": ((64, 64, 128),),
    "car": (
        (64, 0, 128),
        (64, 128, 192),  # pickup
        (192, 128, 192),  # truck, bus
        (192, 64, 128),  # train
        (128, 64, 64),  # other that moves
    ),
    "pedestrian": ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),  # pedestrian, child, cart, animal
    "bicyclist": ((0, 128, 192), (192, 0, 192)),  # bicyclist, motorcycle or scooter
}


@dataclass(frozen=True)
class ColourTable:
    """names: of the classes, by label. labels: the label of each colour, VOID for those that count for nothing."""

    names: tuple[str, ...]
    labels: Mapping[Colour, int]

    @property
    def palette(self) -> np.ndarray:
        """The colour of every label, uint8 (256, 3): of a class with several colours the first."""
        first = {label: colour for colour, label in reversed(list(self.labels.items()))}
        return class_palette(self.names, [first[label] for label in range(len(self.names))])


def voc_colours(names: tuple[str, ...]) -> ColourTable:
    """The colour that VOC's palette gives each label; 255's is void."""
    palette = [tuple(map(int, colour)) for colour in voc_palette()]
    return ColourTable(names, {palette[label]: label for label in (*range(len(names)), VOID)})


def camvid_colours() -> ColourTable:
    """CamVid's 32 colours as the 11 classes that are trained on; black is void."""
    labels = {colour: label for label, colours in enumerate(_CAMVID.values()) for colour in colours}
    return ColourTable(tuple(_CAMVID), {**labels, (0, 0, 0): VOID})


def read_colours(path: str | Path) -> ColourTable:
    """A table from a text file with `name r g b` or `r g b name` in each line, in the order of the labels.

    A name may stand in several lines: their colours become one class. `VOID_NAMES` mean void. Blank
    lines and those that begin with # are skipped. Raises DataError for anything else.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); expected lines of 'name r g b'.") from error
    names: list[str] = []
    labels: dict[Colour, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        entry = name_and_colour(line)
        if entry is None:
            raise DataError(f"{path}, line {number}: expected 'name r g b' with numbers of 0..255, got {line[:60]!r}.")
        name, colour = entry
        if colour in labels:
            raise DataError(f"{path}, line {number}: colour {colour} stands there twice; give each colour one class.")
        if name.lower() in VOID_NAMES:
            labels[colour] = VOID
        else:
            if name not in names:
                names.append(name)
            labels[colour] = names.index(name)
    if not 0 < len(names) <= VOID:
        raise DataError(f"{path}: {len(names)} classes; expected 1 to {VOID} beside void.")
    return ColourTable(tuple(names), labels)


def labels_from_colours(
    colours: np.ndarray, table: ColourTable
) -> tuple[np.ndarray, dict[Colour, tuple[int, int, int]]]:
    """Labels, uint8 (H, W), of a picture, uint8 (H, W, 3); and the colours that the table lacks.

    Where it lacks any, the labels are of no use.
    """
    packed = _pack(colours.reshape(-1, 3))
    keys = _pack(np.array(list(table.labels), np.uint8))
    order = np.argsort(keys)
    values = np.array(list(table.labels.values()), np.uint8)[order]
    place = np.minimum(np.searchsorted(keys[order], packed), len(keys) - 1)
    unknown = np.flatnonzero(keys[order][place] != packed)
    missing = {}
    for value, first, count in zip(*np.unique(packed[unknown], return_index=True, return_counts=True), strict=True):
        row, column = divmod(int(unknown[first]), colours.shape[1])
        missing[int(value) >> 16, int(value) >> 8 & 255, int(value) & 255] = (int(count), row, column)
    return values[place].reshape(colours.shape[:2]), missing


def name_and_colour(line: str) -> tuple[str, Colour] | None:
    """What `name r g b` or `r g b name` means, with numbers of 0..255; None for any other line."""
    words = line.split()
    for numbers, name in ((words[-3:], words[:-3]), (words[:3], words[3:])):
        if name and all(word.isascii() and word.isdigit() and int(word) <= 255 for word in numbers):
            red, green, blue = map(int, numbers)
            return " ".join(name), (red, green, blue)
    return None


def _pack(colours: np.ndarray) -> np.ndarray:
    """uint8 (n, 3) -> uint32 (n,): red, green and blue as one number."""
    red, green, blue = colours.astype(np.uint32).T
    return red << 16 | green << 8 | blue
