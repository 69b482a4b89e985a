"""One id of a data set examined: its image, its mask, whether the two fit, and its annotation."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image

from segnet_scratch.config import MINIMUM_SIZE
from segnet_scratch.data.annotations import ANNOTATION_FOLDER, annotation_file, read_annotation
from segnet_scratch.data.findings import Finding, Findings, FoundError
from segnet_scratch.data.palette import VOID
from segnet_scratch.data.pictures import Role, check_mask, decode, label_facts, mask_labels, orientation, rgb_pixels
from segnet_scratch.data.voc import IMAGE_FOLDER, IMAGE_SUFFIXES, MASK_FOLDER, check_sizes, find_image, mask_file
from segnet_scratch.files import visible_files

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

    Sizes are (height, width); labels the pixels of each of the 256 labels, int64 (256,); colours those that the palette
    gives the labels in the mask; digest stands for the bytes of the image file.
    """

    name: str
    found: Findings = field(default_factory=Findings)
    image_size: tuple[int, int] | None = None
    image_mode: str | None = None
    digest: bytes | None = None
    mask_size: tuple[int, int] | None = None
    mask_mode: str | None = None
    labels: np.ndarray | None = None
    colours: dict[int, bytes] | None = None


class Folders:
    """The folders of a data set, listed once: names in another case, and which folders there are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.masks = _listing(root / IMAGE_FOLDER), _listing(root / MASK_FOLDER)
        self.annotated = (root / ANNOTATION_FOLDER).is_dir()


def examine_pair(folders: Folders, names: tuple[str, ...], name: str) -> PairFacts:
    """Everything about one id; never raises for anything that the files may hold."""
    facts, root = PairFacts(name), folders.root
    image, mask = find_image(root, name), mask_file(root, name)
    beside = [other.name for suffix in IMAGE_SUFFIXES if (other := image.with_name(name + suffix)).is_file()]
    if len(beside) > 1:
        detail = f"beside it {', '.join(beside[1:])}; only the first is read: delete the others."
        facts.found("ambiguous-image", image, detail)
    steps = [partial(_examine_image, facts, root, image), partial(_examine_mask, facts, root, mask, len(names))]
    if folders.annotated:
        steps.append(partial(_examine_annotation, facts, annotation_file(root, name), names))
    for step in steps:
        try:
            step()
        except FoundError as error:
            facts.found.append(_or_other_case(error.finding, folders))
    if facts.image_size and facts.mask_size:
        check_sizes(image, facts.image_size, mask, facts.mask_size, facts.found)
    return facts


def _examine_image(facts: PairFacts, root: Path, path: Path) -> None:
    picture = _examine_file(facts, root, path, "image")
    if picture.mode != "RGB":
        rgb_pixels(picture)  # a conversion that fails is to fail here, not in training
    facts.image_size, facts.image_mode = (picture.height, picture.width), picture.mode
    facts.digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    if code := "image-16-bit" if picture.mode.startswith("I") else _ODD_MODES.get(picture.mode):
        facts.found(code, path, f"mode {picture.mode}; expected RGB.")
    if (picture.format == "PNG") != (path.suffix == ".png"):
        facts.found("image-suffix-lies", path, f"the file is a {picture.format}; rename it.")
    turn, problem = orientation(picture)
    if problem:
        facts.found("image-exif-unreadable", path, f"its EXIF data cannot be read ({problem}); save it without.")
    if turn != 1:
        detail = f"EXIF orientation {turn}; turn the pixels of image and mask, and drop it."
        facts.found("image-exif-rotated", path, detail)
    if min(facts.image_size) < MINIMUM_SIZE:
        facts.found("image-tiny", path, f"{picture.height} x {picture.width} (height x width); is it a thumbnail?")


def _examine_mask(facts: PairFacts, root: Path, path: Path, classes: int) -> None:
    picture = _examine_file(facts, root, path, "mask")
    facts.mask_size, facts.mask_mode = (picture.height, picture.width), picture.mode
    mask = mask_labels(path, picture)
    facts.labels, facts.colours = label_facts(mask, picture)
    if facts.labels[VOID] == mask.size:
        facts.found("mask-all-void", path, "nothing can be learnt from it; mark some pixels.")
    # The histogram tells whether there are any; where they are is worth a second look at the pixels only then.
    if facts.labels[classes:VOID].any():
        check_mask(path, mask, classes, facts.found)


def _examine_file(facts: PairFacts, root: Path, path: Path, role: Role) -> Image.Image:
    """The decoded picture; what image and mask have in common is examined."""
    # Folders may well be links, to another disk say; a single file that is one is worth a look.
    target = path.resolve() if path.is_symlink() and path.exists() else path
    if target != path and not any(target.is_relative_to(folder.resolve()) for folder in (root, path.parent)):
        facts.found(f"{role}-link-outside", path, f"leads to {target}; copy the file there.")
    picture = decode(path, role)
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        facts.found(f"{role}-animated", path, f"{frames} frames; only the first is read.")
    if picture.format == "PNG" and not path.read_bytes().endswith(_PNG_END):
        facts.found(f"{role}-trailing-data", path, "the file goes on after the end of the PNG; save it anew.")
    return picture


def _examine_annotation(facts: PairFacts, path: Path, names: tuple[str, ...]) -> None:
    if not path.is_file():
        raise FoundError("annotation-missing", path, "no such file.")
    annotation = read_annotation(path)
    height, width = annotation.size
    if facts.image_size and annotation.size != facts.image_size:
        detail = f"tells {height} x {width} (height x width), the image has {facts.image_size}."
        facts.found("annotation-size", path, detail)
    for thing in annotation.objects:
        left, top, right, bottom = thing.box
        if left < 1 or top < 1 or right > width or bottom > height:
            place = f"box of {thing.name}, {left:g}..{right:g} across, {top:g}..{bottom:g} down"
            facts.found("annotation-box-outside", path, f"{place}; expected 1..{width}, 1..{height}.")
        if thing.name not in names:
            facts.found("annotation-unknown-class", path, f"object '{thing.name}'; the classes are in labels.txt.")


def _or_other_case(finding: Finding, folders: Folders) -> Finding:
    """The finding, or a better one where a missing file is there but for the case of its suffix or the Unicode form."""
    cases = {"missing-image": (folders.images, IMAGE_SUFFIXES), "missing-mask": (folders.masks, (".png",))}
    listing, suffixes = cases.get(finding.code, ({}, ()))
    role, stem = finding.code.removeprefix("missing-"), finding.path.stem
    for suffix in suffixes:
        other = listing.get(_key(stem + suffix), "")
        if other.startswith(stem):
            return Finding(f"{role}-suffix-case", finding.path, f"only {other} is there; rename it to {suffix}.")
        if normalize("NFC", other).startswith(normalize("NFC", stem)):
            detail = f"only {other} is there, written in another Unicode form than the id: as {other!a}; rename it."
            return Finding(f"{role}-unicode-form", finding.path, detail)
    return finding


def _listing(folder: Path) -> dict[str, str]:
    """Names of the files in a folder by what they have in common with names that look the same."""
    return {_key(path.name): path.name for path in visible_files(folder)} if folder.is_dir() else {}


def _key(name: str) -> str:
    return normalize("NFC", name).lower()
