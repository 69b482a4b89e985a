"""Everything that can be wrong with a data set, by name: the codes that `segnet data verify` reports.

A code never changes its meaning, so that scripts can rely on it. An error makes training or scoring fail or lie; a
warning is legal and read, but seldom what was meant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segnet_scratch.errors import DataError


def _of_both(meanings: dict[str, str]) -> dict[str, str]:
    """Meanings by code, where {role} stands for image and for mask."""
    roles = ("image", "mask")
    return {code.format(role=role): text.format(role=role) for code, text in meanings.items() for role in roles}


ERRORS = _of_both(
    {
        # the root
        "missing-folder": "one of JPEGImages, SegmentationClass and ImageSets/Segmentation is not there",
        "no-splits": "ImageSets/Segmentation holds no list of ids",
        # lists of ids, and labels.txt
        "split-unreadable": "a list of ids is no UTF-8 text",
        "split-name": "a list of ids has a name that --split cannot take",
        "empty-split": "a list of ids names none",
        "duplicate-id": "an id stands twice in one list, so that it counts twice in every score",
        "id-with-path": "an id holds a folder; it would reach outside of the data set",
        "id-with-suffix": "an id ends in .jpg or .png",
        "bad-id": "a line is no plain name",
        "split-overlap": "ids are in a list for training and in one for scoring",
        "labels-unreadable": "labels.txt is no UTF-8 text",
        "labels-empty": "labels.txt names no class",
        "labels-too-many": "labels.txt names more classes than fit beside void",
        "labels-duplicate": "labels.txt names a class twice",
        "labels-case": "labels.txt is there under a name of another case, and would be passed over",
        "labels-colours": "some lines of labels.txt have a colour, and others none or the same one",
        "labels-name": "labels.txt names a class with control characters",
        # pictures: what may be wrong with an image and with a mask alike
        "{role}-link-broken": "the {role} is a link to nowhere",
        "{role}-not-a-file": "a folder, pipe or device stands in place of the {role}",
        "{role}-unreadable": "the system refuses to read the {role}",
        "{role}-zero-bytes": "the file of the {role} is empty",
        "{role}-is-html": "the {role} is a web page, most often an error message saved by a download",
        "{role}-is-lfs-pointer": "the {role} is a Git LFS pointer; its content was never fetched",
        "{role}-is-tiff": "the {role} is a TIFF under another name",
        "{role}-is-gif": "the {role} is a GIF under another name",
        "{role}-is-bmp": "the {role} is a BMP under another name",
        "{role}-is-webp": "the {role} is a WebP under another name",
        "{role}-wrong-format": "the {role} is of a format that is not read",
        "{role}-truncated": "the {role} ends too early",
        "{role}-damaged": "the {role} cannot be decoded, or a checksum in it is wrong",
        "{role}-bomb": "the {role} claims or unpacks to more than is taken",
        "{role}-suffix-case": "the suffix of the {role} is not in lower case",
        "{role}-unicode-form": "the name of the {role} has its accents in another Unicode form than the id",
        "missing-{role}": "an id has no {role}",
        "mask-is-jpeg": "the mask is a JPEG, whose compression invents labels",
        "mask-rgb": "the mask holds colours in place of class numbers",
        "mask-has-alpha": "the mask is grey with transparency",
        "mask-16-bit": "the mask holds 16-bit numbers",
        "label-out-of-range": "a mask holds a label that is neither a class nor void",
        "size-mismatch": "image and mask differ in size",
        "size-transposed": "the mask has the image's height and width exchanged",
        "image-leak": "the same image is in a training and in a scoring list, under two ids",
        # annotations
        "annotation-not-xml": "an annotation is no well-formed XML",
        "annotation-dtd": "an annotation declares a document type or entities",
        "annotation-too-large": "an annotation is larger or deeper than any honest one",
        "annotation-unexpected": "an annotation lacks a field, or holds a value that cannot be",
    }
)
WARNINGS = _of_both(
    {
        "bom-in-split": "a list of ids begins with a byte order mark",
        "crlf-in-split": "a list of ids has line ends of Windows",
        "blank-line-in-split": "a list of ids has blank lines",
        "padded-id": "an id has blanks round it",
        "id-case-clash": "two ids differ in case only; on macOS and Windows they are one file",
        "{role}-link-outside": "the {role} is a link to a file outside of the data set",
        "{role}-animated": "the {role} has several frames; the first is taken",
        "{role}-trailing-data": "something follows the end of the {role}",
        "ambiguous-image": "an id has several images; .jpg goes before .jpeg before .png",
        "image-suffix-lies": "the image is a PNG named .jpg, or a JPEG named .png",
        "image-cmyk": "the image is CMYK; its colours are converted without a profile",
        "image-grey": "the image is grey",
        "image-16-bit": "the image has 16 bits per pixel; the lower 8 are dropped",
        "image-has-alpha": "the image has transparency, which is dropped",
        "image-palette": "the image has a palette of at most 256 colours",
        "image-exif-rotated": "EXIF asks to turn the image; it is not turned, because its mask is not",
        "image-exif-unreadable": "the image has EXIF data that cannot be read",
        "image-tiny": "the image is smaller than 32 pixels on a side",
        "mask-all-void": "a mask holds nothing but void",
        "palettes-differ": "masks have different palettes: were their colours numbered anew, each on its own?",
        "same-image": "two ids have the same image",
        "class-absent": "a class does not occur in a training list",
        "void-as-class": "a class has a name that means void, and is trained like any other",
        "labels-0-and-255": "masks of a training list hold 0 and 255 alone, and 255 is void",
        "labels-from-1": "labels of a training list begin at 1",
        "palette-not-voc": "without labels.txt classes are VOC's, but the palette of the masks is not",
        "annotation-missing": "an id has no annotation while others have",
        "annotation-size": "an annotation tells another size than the image has",
        "annotation-box-outside": "a box reaches out of its image",
        "annotation-unknown-class": "an object has a name that is not among the classes",
    }
)
# All codes with their meanings.
CODES = {**ERRORS, **WARNINGS}


@dataclass(frozen=True)
class Finding:
    """One thing found: its code, the file, and what was expected, what was got and the way out."""

    code: str
    path: Path
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether it is one of ERRORS."""
        return self.code in ERRORS


class FoundError(DataError):
    """A DataError of a known kind; `finding` tells which."""

    def __init__(self, code: str, path: Path, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.finding = Finding(code, path, detail)


# Told the code, the file and the detail of what is found: `refuse` while reading, a Findings while verifying.
Tell = Callable[[str, Path, str], None]


class Findings(list[Finding]):
    """All that was found so far; told of more by a call."""

    def __call__(self, code: str, path: Path, detail: str) -> None:
        self.append(Finding(code, path, detail))


def refuse(code: str, path: Path, detail: str) -> None:
    """Raises FoundError for an error, and lets a warning pass."""
    if code in ERRORS:
        raise FoundError(code, path, detail)
