"""Tables that say what masks hold: colours that stand for classes, or numbers that get others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from segnet_scratch.data.palette import VOID, class_palette, voc_palette
from segnet_scratch.data.pictures import decode, label_counts, mask_labels
from segnet_scratch.errors import ConfigError, DataError

# Red, green and blue, each 0..255.
Colour = tuple[int, int, int]

_NAMED = 3  # colours of a mask that the table lacks

# What people call what belongs to no class, in lower case.
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore", "ignored", "unknown", "unannotated", "don't care",
              "dontcare")  # fmt: skip


@dataclass(frozen=True)
class ColourTable:
    """names: of the classes, by label. labels: the label of each colour, VOID for those that count for nothing."""

    names: tuple[str, ...]
    labels: Mapping[Colour, int]

    # What masks may hold that the table does not tell, and what to do then.
    lacks: ClassVar = (
        "colours that the table lacks",
        "Add the colours to the table (as void, if they mean nothing), or correct the masks: many colours at few "
        "pixels are left along borders by interpolation and by JPEG.",
    )

    def palette(self, old: np.ndarray | None = None) -> np.ndarray:
        """The colour of every label, uint8 (256, 3): of a class with several colours the first."""
        first = {label: colour for colour, label in reversed(list(self.labels.items()))}
        return class_palette(self.names, [first[label] for label in range(len(self.names))])

    def labels_of(self, path: Path) -> np.ndarray | str:
        """The labels in a mask of colours, uint8 (H, W), or what is said of colours that the table lacks."""
        labels, missing = labels_from_colours(_shown(path), self)
        if not missing:
            return labels
        named = [
            f"{colour} (pixels: {count}, first at row {row}, column {column})"
            for colour, (count, row, column) in sorted(missing.items(), key=lambda item: -item[1][0])[:_NAMED]
        ]
        more = f"; and {len(missing) - _NAMED} more colours" if len(missing) > _NAMED else ""
        return f"{path}: {'; '.join(named)}{more}"


def voc_colours(names: tuple[str, ...]) -> ColourTable:
    """The colour that VOC's palette gives each label; 255's is void."""
    palette = [tuple(map(int, colour)) for colour in voc_palette()]
    return ColourTable(names, {palette[label]: label for label in (*range(len(names)), VOID)})


def camvid_colours() -> ColourTable:
    """CamVid's 32 colours as the 11 classes that are trained on; black is void."""
    return read_colours(Path(__file__).with_name("camvid.txt"))


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
    names: dict[str, int] = {}
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
        labels[colour] = VOID if name.lower() in VOID_NAMES else names.setdefault(name, len(names))
    if not 0 < len(names) <= VOID:
        raise DataError(f"{path}: {len(names)} classes; expected 1 to {VOID} beside void.")
    return ColourTable(tuple(names), labels)


def labels_from_colours(colours: np.ndarray, table: ColourTable) -> tuple[np.ndarray, dict[Colour, Colour]]:
    """Labels, uint8 (H, W), of a picture, uint8 (H, W, 3); and the colours that the table lacks.

    Of these the number of pixels, and the row and column of the first. Where there are any, the labels are of no use.
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


def _shown(path: Path) -> np.ndarray:
    """The colours that a mask shows, uint8 (H, W, 3), whatever its mode."""
    picture = decode(path, "mask")
    if picture.mode.startswith("I"):
        raise DataError(f"{path}: 16-bit grey is no colour; expected a picture of 8 bits a channel.")
    shown = np.array(picture.convert("RGBA"))
    see_through = np.argwhere(shown[..., 3] != 255)
    if len(see_through):
        row, column = see_through[0].tolist()
        what = f"{len(see_through)} pixels are transparent, first at row {row}, column {column}"
        raise DataError(f"{path}: {what}, so that their colour is not to be told; save the mask without transparency.")
    return shown[..., :3]


def _pack(colours: np.ndarray) -> np.ndarray:
    """uint8 (n, 3) -> int64 (n,): red, green and blue as one number."""
    return colours.astype(np.int64) @ (1 << 16, 1 << 8, 1)


@dataclass(frozen=True)
class Relabelling:
    """New numbers for the labels of masks, as `segnet data convert --relabel` is told.

    names: of the classes afterwards. kept: their old numbers. lookup: uint8 (256,), the new number of each old one.

    known: bool (256,), whether an old number means anything at all.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]
    lookup: np.ndarray
    known: np.ndarray
    # What masks may hold that it does not tell, and what to do then.
    lacks: ClassVar = (
        "numbers that are no class",
        "Say what each means, for example --relabel 7=void, or name its class in labels.txt.",
    )

    def palette(self, old: np.ndarray | None = None) -> np.ndarray:
        """The colour of every label, uint8 (256, 3): that of its old number, as far as these are known."""
        return class_palette(self.names, None if old is None else old[list(self.kept)].tolist())

    def labels_of(self, path: Path) -> np.ndarray | str:
        """The new labels of a mask, uint8 (H, W); or what is said of numbers that mean nothing."""
        labels = mask_labels(path, decode(path, "mask"))
        if wrong := np.flatnonzero(label_counts(labels) * ~self.known).tolist():
            return f"{path}: {', '.join(map(str, wrong))}"
        return self.lookup[labels]


def parse_relabelling(text: str, names: Sequence[str]) -> Relabelling:
    """What `OLD=NEW,...` makes of the classes `names`.

    OLD is a number or a class, NEW a number, a class or void; what is not mentioned stays. A class that is given
    another number, and whose own nothing takes, is a class no more: the numbers above it move down. Raises ConfigError
    for anything else.
    """
    lookup, known = np.arange(256), np.zeros(256, bool)
    known[: len(names)] = known[VOID] = True
    given = {}
    for part in text.split(","):
        old, equals, new = (word.strip() for word in part.partition("="))
        source, target = _number(old, names), _number(new, names)
        if not equals or source is None or target is None or not (target < len(names) or target == VOID):
            expected = f"a number of 0..255 or a class, to the right a number below {len(names)}, a class, or void"
            example = f"for example 255=1 or {names[-1]}=void"
            raise ConfigError(f"--relabel {part.strip()}: expected OLD=NEW, to the left {expected}; {example}")
        if source in given:
            raise ConfigError(f"--relabel {text}: {old} is given twice")
        given[source] = lookup[source] = target
        known[source] = True
    kept = tuple(label for label in range(len(names)) if given.get(label, label) == label or label in given.values())
    if not kept:
        raise ConfigError(f"--relabel {text}: no class is left")
    places = np.full(256, VOID)
    places[list(kept)] = np.arange(len(kept))
    return Relabelling(tuple(names[label] for label in kept), kept, places[lookup].astype(np.uint8), known)


def _number(word: str, names: Sequence[str]) -> int | None:
    if word in names:
        return list(names).index(word)
    if word.lower() == "void":
        return VOID
    return int(word) if word.isascii() and word.isdigit() and int(word) <= VOID else None
