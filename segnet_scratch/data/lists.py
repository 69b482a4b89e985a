"""The text files of a data set, lists of ids and labels.txt: read to the end, everything odd in them named."""

import os
import re
from collections import Counter
from pathlib import Path

from segnet_scratch.data.colours import Colour, name_and_colour
from segnet_scratch.data.findings import Tell, refuse
from segnet_scratch.data.palette import VOC_CLASSES, VOID
from segnet_scratch.files import reason, visible_files

_BYTE_ORDER_MARK = "\ufeff"


def parse_split(path: Path, found: Tell = refuse) -> list[str]:
    """The ids in a list, in file order, each once; `found` is told what is wrong with the list.

    Lines that are no ids are left out, so ids are plain file names whatever the file holds.
    """
    text = _read(path, "split-unreadable", found)
    if text is None:
        return []
    if text.startswith(_BYTE_ORDER_MARK):
        found("bom-in-split", path, "begins with a byte order mark, which other programs take for part of an id.")
    if "\r" in text:
        found("crlf-in-split", path, "has line ends of Windows, which other programs take for part of each id.")
    ids: dict[str, int] = {}
    lines = dict(enumerate(text.removeprefix(_BYTE_ORDER_MARK).splitlines(), start=1))
    blank = [number for number, line in lines.items() if not line.strip()]
    padded = [number for number, line in lines.items() if line.strip() not in ("", line)]
    for number, line in lines.items():
        if not (name := line.strip()):
            continue
        if code := _fault(name):
            fix = "write plain names without folder, suffix or blanks, at most 240 bytes, one a line."
            found(code, path, f"line {number}: {_shortened(name)} is not an image id; {fix}")
        elif (first := ids.setdefault(name, number)) != number:
            places = f"in lines {first} and {number}; delete one, or it counts twice in every score."
            found("duplicate-id", path, f"id '{name}' stands there twice, {places}")
    if blank:
        found("blank-line-in-split", path, f"has {len(blank)} blank lines, the first is line {blank[0]}.")
    if padded:
        found("padded-id", path, f"has {len(padded)} ids with blanks round them, the first in line {padded[0]}.")
    if len(blank) == len(lines):
        found("empty-split", path, "expected image ids, one a line, got none; fill the file or use another split.")
    return list(ids)


def parse_labels(
    root: Path, file: str = "labels.txt", found: Tell = refuse
) -> tuple[tuple[str, ...], tuple[Colour, ...] | None]:
    """The class names in a data set's labels.txt, or VOC's 21 where there is no such file, and their colours.

    A line is a name, or `name r g b` (or `r g b name`): there are colours where the lines give them, else None. Blank
    lines are skipped. `found` is told what is wrong with the file; the names then are what could be read of them.
    """
    path = root / file
    if not path.exists():
        _look_for_others(path, found)
        return VOC_CLASSES, None
    text = _read(path, "labels-unreadable", found)
    if text is None:
        return (), None
    lines = (line.strip() for line in text.removeprefix(_BYTE_ORDER_MARK).splitlines())
    entries = [name_and_colour(line) or (line, None) for line in lines if line]
    names = tuple(name for name, _ in entries)
    colours = tuple(colour for _, colour in entries if colour is not None)
    different = len(set(colours))
    if colours and different != len(entries):
        fix = "give each class its own, or none a colour."
        found("labels-colours", path, f"{different} colours for {len(entries)} classes; {fix}")
        colours = ()
    if not names:
        found("labels-empty", path, "expected class names, one a line, got an empty file; fill it in or delete it.")
    if len(names) > VOID:
        found("labels-too-many", path, f"{len(names)} class names, at most {VOID} fit beside void; merge some classes.")
    for name, times in Counter(names).items():
        if not name.isprintable():  # an escape sequence would reach the terminal with every table
            fix = "holds control characters; write plain text."
            found("labels-name", path, f"class name {_shortened(name)} {fix}")
        if times > 1:
            found("labels-duplicate", path, f"class name '{name}' stands there twice; every class needs its own name.")
    return names, colours or None


def is_plain_name(name: str) -> bool:
    """Whether a name is one file name on every system: no separator, drive, blank or leading dot (`..`)."""
    fits = name.isprintable() and len(os.fsencode(name)) <= 240
    return fits and re.fullmatch(r"[^./\\: ][^/\\: ]*", name) is not None


def _fault(name: str) -> str | None:
    """The code of what makes a name no id; None for one that is."""
    if "/" in name or "\\" in name or name.startswith(".."):
        return "id-with-path"
    if not is_plain_name(name):
        return "bad-id"
    return "id-with-suffix" if name.lower().endswith((".jpg", ".jpeg", ".png")) else None


def _look_for_others(path: Path, found: Tell) -> None:
    """Tells of a labels.txt that is not there, and yet is meant to be."""
    if path.is_symlink():
        found("labels-unreadable", path, "is a link to nowhere; put the file there, or correct the link.")
    for other in visible_files(path.parent) if path.parent.is_dir() else []:
        if other.name.lower() in (path.name, f"{path.name}.txt"):
            found("labels-case", other, f"would be passed over; rename it to {path.name}.")


def _read(path: Path, code: str, found: Tell) -> str | None:
    try:
        # Bytes, because reading as text would hide the line ends.
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        found(code, path, f"cannot be read: {reason(error)}.")
    except UnicodeDecodeError as error:
        found(code, path, f"cannot be read as UTF-8 text ({error}); save it as plain text.")
    return None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
