"""Reading a data set in PASCAL VOC's layout, and refusing one that is damaged.

ROOT/ImageSets/Segmentation/<split>.txt   ids, one a line
ROOT/JPEGImages/<id>.jpg                  images (.jpeg and .png are taken too)
ROOT/SegmentationClass/<id>.png           masks: class numbers as palette indices, 255 = void
ROOT/labels.txt                           class names, one a line, or name r g b (optional; default: VOC's 21)
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

import numpy as np

from segnet_scratch.data.findings import Tell, refuse
from segnet_scratch.data.lists import is_plain_name, parse_labels, parse_split
from segnet_scratch.data.palette import class_palette
from segnet_scratch.data.pictures import mask_colours, read_image, read_mask
from segnet_scratch.errors import DataError, some_of
from segnet_scratch.files import visible_files

SPLIT_FOLDER = Path("ImageSets", "Segmentation")
IMAGE_FOLDER = "JPEGImages"
MASK_FOLDER = "SegmentationClass"

# What a VOC root holds at least.
FOLDERS = (SPLIT_FOLDER.as_posix(), IMAGE_FOLDER, MASK_FOLDER)

# Suffixes of images; where an id has several, the first goes.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def find_root(path: str | Path, with_masks: bool = True) -> Path:
    """The VOC root that `path` means: `path` itself, `path/VOC2012` or `path/VOCdevkit/VOC2012`.

    Without masks SegmentationClass need not be there. Raises DataError that lists what each place lacks when none of
    them is a VOC root.
    """
    folders = FOLDERS if with_masks else FOLDERS[:2]
    lacks = lacking_folders(Path(path), folders)
    if whole := [root for root, missing in lacks.items() if not missing]:
        return whole[0]
    looked = [
        f"  {root}: " + (f"lacks {', '.join(missing)}" if root.is_dir() else "no such folder")
        for root, missing in lacks.items()
    ]
    fix = f"Pass the folder that holds {', '.join(folders)}."
    raise DataError(f"{path}: no data set in VOC layout found; looked in", *looked, fix)


def lacking_folders(path: Path, folders: Sequence[str] = FOLDERS) -> dict[Path, list[str]]:
    """What each folder lacks that may be the VOC root meant by `path`, in the order in which they are looked at."""
    roots = path, path / "VOC2012", path / "VOCdevkit" / "VOC2012"
    return {root: [folder for folder in folders if not (root / folder).is_dir()] for root in roots}


def class_names(root: Path, file: str = "labels.txt") -> tuple[str, ...]:
    """Names of the classes by label: those in `root/labels.txt`, or VOC's 21 where there is no such file.

    A line is a name, or `name r g b` with the colour of the class. Blank lines are skipped. Raises DataError for a file
    without names, with a name twice, or with more than 255 names (label 255 is void).
    """
    return parse_labels(root, file)[0]


def read_split(root: Path, split: str) -> list[str]:
    """Ids of a split, in the order of `ImageSets/Segmentation/<split>.txt`.

    Raises DataError for a split that does not exist (the message lists those that do), that is empty,
    that names an id twice, or whose ids are not plain file names: an id such as `../x` would reach
    outside of the data set.
    """
    folder = root / SPLIT_FOLDER
    path = folder / f"{split}.txt"
    if not is_plain_name(split) or not path.is_file():
        splits = ", ".join(split_files(root)) or "none"
        raise DataError(f"{path}: there is no split '{split}'; splits in {folder}: {splits}.")
    return parse_split(path)


def split_files(root: Path) -> dict[str, Path]:
    """The lists of ids in a data set by the names of their splits, sorted."""
    folder = root / SPLIT_FOLDER
    return {path.stem: path for path in visible_files(folder) if path.suffix == ".txt"} if folder.is_dir() else {}


def find_image(root: Path, name: str) -> Path:
    """The file of the image with this id; where none exists, the name that VOC would give it."""
    candidates = [root / IMAGE_FOLDER / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


def mask_file(root: Path, name: str) -> Path:
    """The file of the mask with this id, whether it exists or not."""
    return root / MASK_FOLDER / f"{name}.png"


class VOCDataset:
    """One split of a data set in VOC layout.

    path: the VOC root, its parent or its grandparent (see `find_root`). with_masks: False for a split that has images
    only, as VOC's test split; `sample` then has no masks to read.
    Attributes: root, split, ids (in file order), names (of the classes, by label), classes (their number), palette
    (the colour of every label, uint8 (256, 3): see `class_palette`).
    Raises DataError when the root, the split or any image or (with_masks) mask of it is missing.
    """

    def __init__(self, path: str | Path, split: str, with_masks: bool = True) -> None:
        self.root = find_root(path, with_masks)
        self._with_masks = with_masks
        self.split = split
        self.names, self._colours = parse_labels(self.root)
        self.classes = len(self.names)
        self.ids = tuple(read_split(self.root, split))
        self.check()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def palette(self) -> np.ndarray:
        """The colour of every label, uint8 (256, 3): of labels.txt, of the masks, or as `class_palette` chooses."""
        masks = self._with_masks and self.mask_path(0)
        colours = self._colours or (mask_colours(masks, self.classes) if masks else None)
        return class_palette(self.names, colours)

    def image_path(self, index: int) -> Path:
        """The file of image `index`; where none exists, the name that VOC would give it."""
        return find_image(self.root, self.ids[index])

    def mask_path(self, index: int) -> Path:
        """The file of mask `index`."""
        return mask_file(self.root, self.ids[index])

    def check(self) -> None:
        """Raises DataError that counts all missing images and masks and names the first few.

        Only looks whether the files are there (milliseconds for VOC); `sample` reads and judges them.
        """
        problems: list[str] = []
        kinds = (("images", self.image_path), ("masks", self.mask_path))
        for kind, path_of in kinds if self._with_masks else kinds[:1]:
            missing = [path for path in map(path_of, range(len(self))) if not path.is_file()]
            if missing:
                other = " (some are there in another Unicode form)" if any(map(_in_another_form, missing)) else ""
                listing = "" if problems else f"{self.root / SPLIT_FOLDER / self.split}.txt: "
                problems.append(f"{listing}{len(missing)} of {len(self)} {kind} are missing{other}:")
                problems += some_of(missing)
        if problems:
            raise DataError(*problems, "Add the files, or take their ids out of the split.")

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Image uint8 (H, W, 3), mask uint8 (H, W) and id of one sample, at their size on disk.

        Raises DataError as `read_image` and `read_mask` do, and when the two differ in size.
        """
        image = read_image(self.image_path(index))
        mask = read_mask(self.mask_path(index), self.classes)
        check_sizes(self.image_path(index), image.shape[:2], self.mask_path(index), mask.shape)
        return image, mask, self.ids[index]


def _in_another_form(path: Path) -> bool:
    """Whether a file lies there whose name looks the same: accents as letters of their own, or the other way round."""
    return any(path.with_name(normalize(form, path.name)).is_file() for form in ("NFC", "NFD"))


def check_sizes(
    image: Path, image_size: tuple[int, ...], mask: Path, mask_size: tuple[int, ...], found: Tell = refuse
) -> None:
    """Tells of a pair whose sizes (height, width) differ."""
    if image_size != mask_size:
        code = "size-transposed" if image_size == mask_size[::-1] else "size-mismatch"
        (height, width), (mask_height, mask_width) = image_size, mask_size
        sizes = f"mask of {mask_height} x {mask_width} (height x width) for an image of {height} x {width} ({image})"
        found(code, mask, f"{sizes}; both need the same size.")
