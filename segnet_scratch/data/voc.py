"""Reading a data set in PASCAL VOC's layout, and refusing one that is damaged.

ROOT/ImageSets/Segmentation/<split>.txt   ids, one a line
ROOT/JPEGImages/<id>.jpg                  images (.jpeg and .png are taken too)
ROOT/SegmentationClass/<id>.png           masks: class numbers as palette indices, 255 = void
ROOT/labels.txt                           class names, one a line (optional; default: VOC's 21)
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from segnet_scratch.data.palette import VOC_CLASSES, VOID
from segnet_scratch.errors import DataError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a file of some kB can claim to hold gigapixels."""

SPLIT_FOLDER = Path("ImageSets", "Segmentation")
IMAGE_FOLDER = "JPEGImages"
MASK_FOLDER = "SegmentationClass"

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# A format that Pillow is not told to expect is never parsed, so a flaw in a rare decoder cannot be reached.
_DATASET_FORMATS = ("JPEG", "PNG")
_PREDICTION_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_MASK_FORMATS = ("PNG",)
_NAMED_AT_MOST = 5


def find_root(path: str | Path, with_masks: bool = True) -> Path:
    """The VOC root that `path` means: `path` itself, `path/VOC2012` or `path/VOCdevkit/VOC2012`.

    Without masks SegmentationClass need not be there. Raises DataError that lists what each place lacks when none of
    them is a VOC root.
    """
    path = Path(path)
    folders = (SPLIT_FOLDER, Path(IMAGE_FOLDER), *([Path(MASK_FOLDER)] if with_masks else []))
    looked = []
    for root in (path, path / "VOC2012", path / "VOCdevkit" / "VOC2012"):
        missing = [folder.as_posix() for folder in folders if not (root / folder).is_dir()]
        if not missing:
            return root
        looked.append(f"  {root}: " + (f"lacks {', '.join(missing)}" if root.is_dir() else "no such folder"))
    raise DataError(
        f"{path}: no data set in VOC layout found; looked in\n"
        + "\n".join(looked)
        + f"\nPass the folder that holds {', '.join(folder.as_posix() for folder in folders)}."
    )


def class_names(root: Path) -> tuple[str, ...]:
    """Names of the classes by label: the lines of `root/labels.txt`, or VOC's 21 where there is no such file.

    Blank lines are skipped. Raises DataError for a file without names, with a name twice, or with more
    than 255 names (label 255 is void).
    """
    path = root / "labels.txt"
    if not path.exists():
        return VOC_CLASSES
    names = [line for line in _read_lines(path) if line]
    if not names:
        raise DataError(f"{path}: expected class names, one a line, got an empty file; fill it in or delete it.")
    if len(names) > VOID:
        raise DataError(f"{path}: {len(names)} class names, at most {VOID} fit beside void; merge some classes.")
    if twice := _first_repeated(names):
        raise DataError(f"{path}: class name '{twice}' stands there twice; every class needs its own name.")
    return tuple(names)


def read_split(root: Path, split: str) -> list[str]:
    """Ids of a split, in the order of `ImageSets/Segmentation/<split>.txt`.

    Raises DataError for a split that does not exist (the message lists those that do), that is empty,
    that names an id twice, or whose ids are not plain file names: an id such as `../x` would reach
    outside of the data set.
    """
    folder = root / SPLIT_FOLDER
    path = folder / f"{split}.txt"
    if not _is_plain_name(split) or not path.is_file():
        splits = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "none"
        raise DataError(f"{path}: there is no split '{split}'; splits in {folder}: {splits}.")
    ids = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line:
            continue
        if not _is_plain_name(line):
            raise DataError(
                f"{path}, line {number}: {_shortened(line)} is not an image id; "
                "write plain names without folder, suffix or blanks, one a line."
            )
        ids.append(line)
    if not ids:
        raise DataError(f"{path}: expected image ids, one a line, got none; fill the file or use another split.")
    if twice := _first_repeated(ids):
        raise DataError(f"{path}: id '{twice}' stands there twice; delete one, or it counts twice in every score.")
    return ids


def read_image(path: str | Path, *, for_prediction: bool = False) -> np.ndarray:
    """A picture as uint8 (H, W, 3), RGB; greyscale, palette and CMYK are converted, alpha is dropped.

    A data set's pictures are JPEG or PNG and are never turned by their EXIF orientation, because their
    masks are not. With `for_prediction` BMP and WebP are read too and the picture is turned upright.
    Raises DataError for a file that is missing, damaged, of another format or larger than MAX_PIXELS.
    """
    path = Path(path)
    formats = _PREDICTION_FORMATS if for_prediction else _DATASET_FORMATS
    picture = _decode(path, formats, upright=for_prediction)
    if picture.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion would clip everything above 255 to white.
        grey = (np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


def read_mask(path: str | Path, classes: int) -> np.ndarray:
    """A mask as uint8 (H, W): palette indices (or grey values) as they are stored, each < `classes` or 255.

    Raises DataError for a file that is missing, damaged or not a PNG, for a colour-valued mask, and for
    a label that is neither a class nor void.
    """
    path = Path(path)
    picture = _decode(path, _MASK_FORMATS, upright=False)
    if picture.mode not in ("P", "L", "1"):
        raise DataError(
            f"{path}: expected class numbers as palette indices (PNG of mode P or L), got mode {picture.mode}"
            f"{', a colour-coded mask' if picture.mode.startswith('RGB') else ''}; "
            "replace every colour by the number of its class and save it as an indexed PNG."
        )
    mask = np.array(picture, dtype=np.uint8)
    if picture.mode == "L":
        # Greyscale of 2 or 4 bits a pixel comes out of Pillow stretched to 0..255; labels must not be.
        mask //= 255 // (2 ** min(_png_bit_depth(path), 8) - 1)
    wrong = (mask >= classes) & (mask != VOID)
    if wrong.any():
        row, column = (int(axis[0]) for axis in np.nonzero(wrong))
        label = int(mask[row, column])
        others = np.unique(mask[wrong]).size - 1
        raise DataError(
            f"{path}: label {label} in {np.count_nonzero(mask == label)} pixels, "
            f"first at row {row}, column {column}"
            f"{f', and {others} other wrong labels' if others else ''}; "
            f"expected 0..{classes - 1} or {VOID} (void). "
            "Correct the mask, or name every class in labels.txt."
        )
    return mask


class VOCDataset:
    """One split of a data set in VOC layout.

    path: the VOC root, its parent or its grandparent (see `find_root`). with_masks: False for a split that has images
    only, as VOC's test split; `sample` then has no masks to read.
    Attributes: root, split, ids (in file order), names (of the classes, by label), classes (their number).
    Raises DataError when the root, the split or any image or (with_masks) mask of it is missing.
    """

    def __init__(self, path: str | Path, split: str, with_masks: bool = True) -> None:
        self.root = find_root(path, with_masks)
        self._with_masks = with_masks
        self.split = split
        self.names = class_names(self.root)
        self.classes = len(self.names)
        self.ids = tuple(read_split(self.root, split))
        self.check()

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, index: int) -> Path:
        """The file of image `index`; where none exists, the name that VOC would give it."""
        folder = self.root / IMAGE_FOLDER
        candidates = [folder / f"{self.ids[index]}{suffix}" for suffix in _IMAGE_SUFFIXES]
        return next((path for path in candidates if path.is_file()), candidates[0])

    def mask_path(self, index: int) -> Path:
        """The file of mask `index`."""
        return self.root / MASK_FOLDER / f"{self.ids[index]}.png"

    def check(self) -> None:
        """Raises DataError that counts all missing images and masks and names the first few.

        Only looks whether the files are there (milliseconds for VOC); `sample` reads and judges them.
        """
        problems = []
        kinds = (("images", self.image_path), ("masks", self.mask_path))
        for kind, path_of in kinds if self._with_masks else kinds[:1]:
            missing = [path for path in map(path_of, range(len(self))) if not path.is_file()]
            if missing:
                named = "".join(f"\n  {path}" for path in missing[:_NAMED_AT_MOST])
                more = f"\n  and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
                problems.append(f"{len(missing)} of {len(self)} {kind} are missing:{named}{more}")
        if problems:
            listing = self.root / SPLIT_FOLDER / f"{self.split}.txt"
            raise DataError(
                f"{listing}: " + "\n".join(problems) + "\nAdd the files, or take their ids out of the split."
            )

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Image uint8 (H, W, 3), mask uint8 (H, W) and id of one sample, at their size on disk.

        Raises DataError as `read_image` and `read_mask` do, and when the two differ in size.
        """
        image = read_image(self.image_path(index))
        mask = read_mask(self.mask_path(index), self.classes)
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"{self.mask_path(index)}: mask of {_extent(mask)} for an image of {_extent(image)} "
                f"({self.image_path(index)}); both need the same size."
            )
        return image, mask, self.ids[index]


def _decode(path: Path, formats: tuple[str, ...], upright: bool) -> Image.Image:
    """The decoded picture, turned by its EXIF orientation if `upright`.

    Whatever goes wrong becomes a DataError that names the file.
    """
    expected = " or ".join(formats)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {problem}; expected a {expected} picture there.")
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            if not start:
                raise DataError(f"{path}: the file is empty (0 bytes); copy it from the source again.")
            picture = Image.open(stream, formats=formats)
            if picture.width * picture.height > MAX_PIXELS:
                raise _too_large(path)
            if picture.format == "PNG":
                # Decoding alone skips the checksums, so that a flipped bit would pass as another label.
                picture.verify()
                picture = Image.open(stream, formats=formats)
            picture.load()
            return ImageOps.exif_transpose(picture) if upright else picture
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: not readable as {expected} (the file starts with {start!r}); "
            "convert it, or copy it from the source again."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path) from error
    except Exception as error:  # decoders meet damage with almost any type: SyntaxError, struct.error, ...
        raise DataError(
            f"{path}: the picture is damaged or cut off ({error}); copy it from the source again."
        ) from error


def _too_large(path: Path) -> DataError:
    return DataError(f"{path}: expected at most {MAX_PIXELS:,} pixels, got more; scale the picture down.")


def _png_bit_depth(path: Path) -> int:
    with path.open("rb") as stream:
        return stream.read(25)[24]  # signature 8, chunk length 4, "IHDR" 4, width 4, height 4


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it as plain text.") from error


def _is_plain_name(name: str) -> bool:
    """Whether a name is one file name on every system: no separator, drive, blank or leading dot (`..`)."""
    return (
        bool(name)
        and name.isprintable()
        and len(os.fsencode(name)) <= 240
        and not name.startswith(".")
        and not any(mark in name for mark in "/\\: ")
    )


def _first_repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _extent(array: np.ndarray) -> str:
    height, width = array.shape[:2]
    return f"{height} x {width} (height x width)"
