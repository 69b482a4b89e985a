"""The text files of a data set, lists of ids and labels.txt: read to the end, everything odd in them named."""

import os
from pathlib import Path

from segnet_scratch.data.colours import Colour, name_and_colour
from segnet_scratch.data.findings import Finding
from segnet_scratch.data.palette import VOC_CLASSES, VOID
from segnet_scratch.files import reason, visible_files

_BYTE_ORDER_MARK = "\ufeff"


def parse_split(path: Path) -> tuple[list[str], list[Finding]]:
    """The ids in a list, in file order, each once; and what is wrong with the list.

    Lines that are no ids are left out, so ids are plain file names whatever the file holds.
    """
    text, findings = _read(path, "split-unreadable")
    if text is None:
        return [], findings

    def found(code: str, detail: str) -> None:
        findings.append(Finding(code, path, detail))

    if text.startswith(_BYTE_ORDER_MARK):
        text = text.removeprefix(_BYTE_ORDER_MARK)
        found("bom-in-split", "begins with a byte order mark, which other programs take for part of the first id.")
    if "\r" in text:
        found("crlf-in-split", "has line ends of Windows, which other programs take for part of each id.")
    ids: dict[str, int] = {}
    blank, padded = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if not name:
            blank.append(number)
            continue
        if name != line:
            padded.append(number)
        if code := _fault(name):
            fix = "write plain names without folder, suffix or blanks, at most 240 bytes, one a line."
            found(code, f"line {number}: {_shortened(name)} is not an image id; {fix}")
        elif name in ids:
            found(
                "duplicate-id",
                f"id '{name}' stands there twice, in lines {ids[name]} and {number}; delete one, or it counts twice in "
                "every score.",
            )
        else:
            ids[name] = number
    if blank:
        found("blank-line-in-split", f"has {len(blank)} blank lines, the first is line {blank[0]}.")
    if padded:
        found("padded-id", f"has {len(padded)} ids with blanks round them, the first in line {padded[0]}.")
    if not ids and not any(finding.is_error for finding in findings):
        found("empty-split", "expected image ids, one a line, got none; fill the file or use another split.")
    return list(ids), findings


def parse_labels(
    root: Path, file: str = "labels.txt"
) -> tuple[tuple[str, ...], tuple[Colour, ...] | None, list[Finding]]:
    """The class names in a data set's labels.txt, or VOC's 21 where there is no such file; and what is wrong with it.

    A line is a name, or `name r g b` (or `r g b name`): between the two, the colours of the classes where the lines
    give them, else None. Blank lines are skipped. Where an error is found the names are what could be read of them.
    """
    path = root / file
    if not path.exists():
        return VOC_CLASSES, None, _absent(path)
    text, findings = _read(path, "labels-unreadable")
    if text is None:
        return (), None, findings
    lines = (line.strip() for line in text.removeprefix(_BYTE_ORDER_MARK).splitlines())
    entries = [name_and_colour(line) or (line, None) for line in lines if line]
    names = [name for name, _ in entries]
    colours = tuple(colour for _, colour in entries if colour is not None)
    if colours and len(set(colours)) != len(entries):
        detail = f"{len(set(colours))} colours for {len(entries)} classes; give each class its own, or none a colour."
        findings.append(Finding("labels-colours", path, detail))
        colours = ()
    if not names:
        detail = "expected class names, one a line, got an empty file; fill it in or delete it."
        findings.append(Finding("labels-empty", path, detail))
    if len(names) > VOID:
        detail = f"{len(names)} class names, at most {VOID} fit beside void; merge some classes."
        findings.append(Finding("labels-too-many", path, detail))
    seen: set[str] = set()
    for name in names:
        if not name.isprintable():  # an escape sequence would reach the terminal with every table
            detail = f"class name {_shortened(name)} holds control characters; write plain text."
            findings.append(Finding("labels-name", path, detail))
        if name in seen:
            detail = f"class name '{name}' stands there twice; every class needs its own name."
            findings.append(Finding("labels-duplicate", path, detail))
        seen.add(name)
    return tuple(names), colours or None, findings


def is_plain_name(name: str) -> bool:
    """Whether a name is one file name on every system: no separator, drive, blank or leading dot (`..`)."""
    return (
        bool(name)
        and name.isprintable()
        and len(os.fsencode(name)) <= 240
        and not name.startswith(".")
        and not any(mark in name for mark in "/\\: ")
    )


def _fault(name: str) -> str | None:
    """The code of what makes a name no id; None for one that is."""
    if "/" in name or "\\" in name or name.startswith(".."):
        return "id-with-path"
    if not is_plain_name(name):
        return "bad-id"
    return "id-with-suffix" if name.lower().endswith((".jpg", ".jpeg", ".png")) else None


def _absent(path: Path) -> list[Finding]:
    """What is said of a labels.txt that is not there, and yet is meant to be."""
    if path.is_symlink():
        return [Finding("labels-unreadable", path, "is a link to nowhere; put the file there, or correct the link.")]
    others = visible_files(path.parent) if path.parent.is_dir() else []
    alike = (other for other in others if other.name.lower() in (path.name, f"{path.name}.txt"))
    return [Finding("labels-case", other, f"would be passed over; rename it to {path.name}.") for other in alike]


def _read(path: Path, code: str) -> tuple[str | None, list[Finding]]:
    try:
        # Bytes, because reading as text would hide the line ends.
        return path.read_bytes().decode("utf-8"), []
    except OSError as error:
        return None, [Finding(code, path, f"cannot be read: {reason(error)}.")]
    except UnicodeDecodeError as error:
        return None, [Finding(code, path, f"cannot be read as UTF-8 text ({error}); save it as plain text.")]


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
