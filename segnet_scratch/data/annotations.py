"""The XML beside each image of VOC (Annotations/ID.xml): boxes and names of its objects.

xml.etree's parser expands entities: a kilobyte of them can become gigabytes, and an external one reads any file. Here
a document type declaration, without which there are no entities, ends the reading.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser, fromstring

from segnet_scratch.data.findings import FoundError
from segnet_scratch.errors import DataError

ANNOTATION_FOLDER = "Annotations"

_MAX_BYTES = 1 << 20  # the largest of VOC2012 has some 20 kB
_MAX_DEPTH = 32


@dataclass(frozen=True)
class ObjectBox:
    """One object of an image.

    box: (left, top, right, bottom) as VOC counts, in pixels from 1, both ends inside; some files have fractions.
    truncated: the box holds only part of the object. difficult: left out of VOC's detection scores.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool
    truncated: bool


@dataclass(frozen=True)
class Annotation:
    """size: (height, width) of the image in pixels; objects in the order of the file."""

    size: tuple[int, int]
    objects: tuple[ObjectBox, ...]


def annotation_file(root: Path, name: str) -> Path:
    """The file of the annotation with this id, whether it exists or not."""
    return root / ANNOTATION_FOLDER / f"{name}.xml"


def read_annotation(path: str | Path) -> Annotation:
    """The annotation in a file.

    Raises DataError, which names the file, for one that is missing, that is not well-formed XML, that declares a
    document type or entities, that is larger than 1 MiB, or that lacks a field.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected an annotation there.") from error
    root = _parse(path, content)
    size = _child(path, root, "size")
    height, width = (_number(path, size, side) for side in ("height", "width"))
    if not (height.is_integer() and width.is_integer() and min(height, width) >= 1):
        _refuse(path, f"size {width:g} x {height:g}: expected whole numbers of pixels of at least 1")
    objects = tuple(_object(path, element) for element in root.iterfind("object"))
    return Annotation((int(height), int(width)), objects)


class _Builder(TreeBuilder):
    """Builds the tree of a file, and ends with a FoundError where that is not worth it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._depth = path, 0

    def start(self, tag: str, attributes: dict[Any, Any], /) -> Element:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise FoundError("annotation-too-large", self._path, f"elements nested deeper than {_MAX_DEPTH}.")
        return super().start(tag.rpartition("}")[2], attributes)  # whatever namespace it is of

    def end(self, tag: str, /) -> Element:
        self._depth -= 1
        return super().end(tag.rpartition("}")[2])

    def doctype(self, *_: object) -> NoReturn:
        """Told of a declaration before anything in it is read."""
        detail = "declares a document type, which can hide anything; remove it."
        raise FoundError("annotation-dtd", self._path, detail)


def _parse(path: Path, content: bytes) -> Element:
    """The root element. Whatever is wrong becomes a FoundError."""
    if len(content) > _MAX_BYTES:
        raise FoundError("annotation-too-large", path, f"more than {_MAX_BYTES} bytes; no annotation needs them.")
    try:
        return fromstring(content, XMLParser(target=_Builder(path)))
    except (ParseError, LookupError, ValueError) as error:  # the latter two: an encoding that Python lacks
        detail = f"no well-formed XML ({error}); copy it from the source again."
        raise FoundError("annotation-not-xml", path, detail) from error


def _object(path: Path, element: Element) -> ObjectBox:
    name = (_child(path, element, "name").text or "").strip()
    if not name or not name.isprintable() or len(name) > 100:
        _refuse(path, f"the name of an object is {name[:20]!r}; expected one line of text")
    bounds = _child(path, element, "bndbox")
    left, top, right, bottom = (_number(path, bounds, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    if left > right or top > bottom:
        _refuse(path, f"box of {name}: left {left:g}, right {right:g}, top {top:g}, bottom {bottom:g} are in disorder")
    flags = [(element.findtext(flag) or "0").strip() for flag in ("difficult", "truncated")]
    if not {*flags} <= {"0", "1"}:
        _refuse(path, f"difficult, truncated of {name} are {flags[0][:20]!r}, {flags[1][:20]!r}; expected 0 or 1")
    return ObjectBox(name, (left, top, right, bottom), flags[0] == "1", flags[1] == "1")


def _child(path: Path, element: Element, tag: str) -> Element:
    found = element.find(tag)
    if found is None:
        _refuse(path, f"{element.tag} has no {tag}")
    return found


def _number(path: Path, element: Element, tag: str) -> float:
    text = (_child(path, element, tag).text or "").strip()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        _refuse(path, f"{tag} is {text[:20]!r}; expected a number")
    return number


def _refuse(path: Path, problem: str) -> NoReturn:
    raise FoundError("annotation-unexpected", path, f"{problem}; correct it as in VOC's own annotations.")
