"""One id of a data set examined: its image, its mask, whether the two fit, and its annotation."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image

from segnet_scratch.data.annotations import ANNOTATION_FOLDER, annotation_file, read_annotation
from segnet_scratch.data.findings import Finding, FoundError
from segnet_scratch.data.palette import VOID
from segnet_scratch.data.pictures import (
    Role,
    decode,
    label_counts,
    mask_labels,
    orientation,
    palette_of,
    rgb_pixels,
    wrong_labels,
)
from segnet_scratch.data.voc import IMAGE_FOLDER, IMAGE_SUFFIXES, MASK_FOLDER, find_image, mask_file, sizes_differ
from segnet_scratch.files import visible_files

_SMALL = 32  # five 2x2 pools leave one position of a 32-pixel side
_PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"

_ODD_MODES = {
    **dict.fromkeys(("CMYK", "YCCK"), "image-cmyk"),
    **dict.fromkeys(("L", "1"), "image-grey"),
    **dict.fromkeys(("LA", "RGBA"), "image-has-alpha"),
    "P": "image-palette",
}


@dataclass
class PairFacts:
    """What was seen of one id. What could not be read is None.

    Sizes are (height, width); labels the pixels of each of the 256 labels, int64 (256,); digest stands for the bytes
    of the image file.
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    image_mode: str | None = None
    mask_mode: str | None = None
    palette: bytes | None = None
    labels: np.ndarray | None = None
    digest: bytes | None = None


class Folders:
    """The folders of a data set, listed once: names in another case, and which folders there are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.masks = _listing(root / IMAGE_FOLDER), _listing(root / MASK_FOLDER)
        self.annotated = (root / ANNOTATION_FOLDER).is_dir()


def examine_pair(folders: Folders, names: tuple[str, ...], name: str) -> PairFacts:
    """Everything about one id; never raises for anything that the files may hold."""
    facts = PairFacts(name)
    image, mask = find_image(folders.root, name), mask_file(folders.root, name)
    beside = [other for suffix in IMAGE_SUFFIXES if (other := image.with_name(name + suffix)).is_file()]
    if len(beside) > 1:
        detail = f"beside it {', '.join(path.name for path in beside[1:])}; only the first is read: delete the others."
        facts.findings.append(Finding("ambiguous-image", image, detail))
    _examine_image(facts, image, folders.images)
    mask_size = _examine_mask(facts, mask, folders.masks, len(names))
    if facts.image_size and mask_size and (finding := sizes_differ(image, facts.image_size, mask, mask_size)):
        facts.findings.append(finding)
    for path in (image, mask):
        _examine_link(facts, folders.root, path, "mask" if path is mask else "image")
    if folders.annotated:
        _examine_annotation(facts, annotation_file(folders.root, name), names)
    return facts


def _examine_image(facts: PairFacts, path: Path, listing: Mapping[str, str]) -> None:
    def found(code: str, detail: str) -> None:
        facts.findings.append(Finding(code, path, detail))

    try:
        picture = decode(path, "image")
        if picture.mode != "RGB":
            rgb_pixels(picture)  # a conversion that fails is to fail here, not in training
    except FoundError as error:
        facts.findings.append(_or_other_case(error.finding, listing, IMAGE_SUFFIXES))
        return
    facts.image_size, facts.image_mode = (picture.height, picture.width), picture.mode
    facts.digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    if code := "image-16-bit" if picture.mode.startswith("I") else _ODD_MODES.get(picture.mode):
        found(code, f"mode {picture.mode}; expected RGB.")
    if (picture.format == "PNG") != (path.suffix == ".png"):
        found("image-suffix-lies", f"the file is a {picture.format}; rename it.")
    turn, problem = orientation(picture)
    if problem:
        found("image-exif-unreadable", f"its EXIF data cannot be read ({problem}); save it without.")
    if turn != 1:
        found("image-exif-rotated", f"EXIF orientation {turn}; turn the pixels of image and mask, and drop it.")
    if min(facts.image_size) < _SMALL:
        found("image-tiny", f"{picture.height} x {picture.width} (height x width); is it a thumbnail?")
    _examine_file(facts, path, picture, "image")


def _examine_mask(facts: PairFacts, path: Path, listing: Mapping[str, str], classes: int) -> tuple[int, int] | None:
    """Adds what the mask holds; returns its (height, width), known even where its labels are wrong."""
    try:
        picture = decode(path, "mask")
    except FoundError as error:
        facts.findings.append(_or_other_case(error.finding, listing, (".png",)))
        return None
    facts.mask_mode = picture.mode
    size = (picture.height, picture.width)
    _examine_file(facts, path, picture, "mask")
    try:
        mask = mask_labels(path, picture)
    except FoundError as error:
        facts.findings.append(error.finding)
        return size
    facts.labels = label_counts(mask)
    facts.palette = palette_of(picture)
    if facts.labels[VOID] == mask.size:
        facts.findings.append(Finding("mask-all-void", path, "nothing can be learnt from it; mark some pixels."))
    # The histogram tells whether there are any; where they are is worth a second look at the pixels only then.
    if facts.labels[classes:VOID].any() and (finding := wrong_labels(path, mask, classes)):
        facts.findings.append(finding)
    return size


def _examine_file(facts: PairFacts, path: Path, picture: Image.Image, role: Role) -> None:
    """What image and mask have in common."""
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        facts.findings.append(Finding(f"{role}-animated", path, f"{frames} frames; only the first is read."))
    if picture.format == "PNG":
        with path.open("rb") as stream:
            stream.seek(-len(_PNG_END), 2)
            if stream.read() != _PNG_END:
                detail = "the file goes on after the end of the PNG; save it anew."
                facts.findings.append(Finding(f"{role}-trailing-data", path, detail))


def _examine_link(facts: PairFacts, root: Path, path: Path, role: Role) -> None:
    # Folders may well be links, to another disk say; a single file that is one is worth a look.
    if path.is_symlink() and path.exists():
        target = path.resolve()
        if not any(target.is_relative_to(folder.resolve()) for folder in (root, path.parent)):
            facts.findings.append(Finding(f"{role}-link-outside", path, f"leads to {target}; copy the file there."))


def _examine_annotation(facts: PairFacts, path: Path, names: tuple[str, ...]) -> None:
    def found(code: str, detail: str) -> None:
        facts.findings.append(Finding(code, path, detail))

    if not path.is_file():
        return found("annotation-missing", "no such file.")
    try:
        annotation = read_annotation(path)
    except FoundError as error:
        facts.findings.append(error.finding)
        return None
    height, width = annotation.size
    if facts.image_size and annotation.size != facts.image_size:
        found("annotation-size", f"tells {height} x {width} (height x width), the image has {facts.image_size}.")
    for thing in annotation.objects:
        left, top, right, bottom = thing.box
        if left < 1 or top < 1 or right > width or bottom > height:
            place = f"{left:g}..{right:g} across, {top:g}..{bottom:g} down"
            found("annotation-box-outside", f"box of {thing.name}, {place}; expected 1..{width}, 1..{height}.")
        if thing.name not in names:
            found("annotation-unknown-class", f"object '{thing.name}'; the classes are in labels.txt.")
    return None


def _or_other_case(finding: Finding, listing: Mapping[str, str], suffixes: tuple[str, ...]) -> Finding:
    """The finding, or a better one where a missing file is there but for the case of its suffix or the Unicode form."""
    if finding.code not in ("missing-image", "missing-mask"):
        return finding
    role, stem = finding.code.removeprefix("missing-"), finding.path.stem
    for suffix in suffixes:
        other = listing.get(_key(stem + suffix))
        if other is not None and other.startswith(stem):
            return Finding(f"{role}-suffix-case", finding.path, f"only {other} is there; rename it to {suffix}.")
        if other is not None and normalize("NFC", other).startswith(normalize("NFC", stem)):
            detail = f"only {other} is there, written in another Unicode form than the id: as {other!a}; rename it."
            return Finding(f"{role}-unicode-form", finding.path, detail)
    return finding


def _listing(folder: Path) -> dict[str, str]:
    """Names of the files in a folder by what they have in common with names that look the same."""
    return {_key(path.name): path.name for path in visible_files(folder)} if folder.is_dir() else {}


def _key(name: str) -> str:
    return normalize("NFC", name).lower()
