"""Masks that hold colours or other numbers, converted to indexed ones: a new data set in VOC layout."""

from functools import partial
from pathlib import Path

import numpy as np

from segnet_scratch.data.colours import ColourTable, voc_colours
from segnet_scratch.data.conversion import Pair, by_id, draw_splits, write_dataset
from segnet_scratch.data.relabel import Relabelling
from segnet_scratch.data.voc import SPLIT_FOLDER, VOCDataset, class_names, find_root, split_files
from segnet_scratch.data.walk import Progress, silent
from segnet_scratch.errors import DataError
from segnet_scratch.files import visible_files


def convert_masks(
    source: str | Path, out: str | Path, table: ColourTable | Relabelling | None = None, progress: Progress = silent
) -> int:
    """Writes the data set `source`, in VOC layout but with colours or other numbers in its masks, to `out`.

    table: the numbers of colours, or new ones of labels; VOC's colours for the classes of the set unless given. All
    ids that a split names are taken, images are copied, labels.txt is written. `out` appears whole or not at all.
    progress is told of the masks done and their number. Returns the number of masks.

    Raises DataError where `out` holds something, where files are missing or damaged, and for what the table lacks: the
    message tells the masks, and of each colour the pixels and the first place.
    """
    root = find_root(source)
    table = table or voc_colours(class_names(root))
    splits = [VOCDataset(root, split) for split in split_files(root)]
    if not splits:
        raise DataError(f"{root / SPLIT_FOLDER}: expected lists such as train.txt, got none; name the images in one.")
    pairs = {
        name: Pair(split.image_path(index), partial(_labels, split.mask_path(index), table))
        for split in splits
        for index, name in enumerate(split.ids)
    }
    palette, lists = table.palette(splits[0].palette), {split.split: split.ids for split in splits}
    return write_dataset(Path(out), table.names, palette, pairs, lists, False, progress, table.lacks)


def convert_folders(
    source: Path, out: Path, table: ColourTable | Relabelling, val: float, seed: int, progress: Progress = silent
) -> int:
    """Writes a folder with `images/` and `masks/`, of the same names, to `out` in VOC layout; as `convert_masks`.

    The lists are drawn: see `draw_splits`.
    """
    images, masks = ({path.stem: path for path in visible_files(source / name)} for name in ("images", "masks"))
    if alone := images.keys() ^ masks.keys():
        path = (images | masks)[min(alone)]
        other = "masks" if path.parent.name == "images" else "images"
        raise DataError(f"{path}: has no counterpart in {other}/ ({len(alone)} such files); add it, or move it away.")
    pairs = by_id({name: Pair(path, partial(_labels, masks[name], table)) for name, path in images.items()})
    splits = draw_splits(pairs, val, seed)
    return write_dataset(out, table.names, table.palette(), pairs, splits, progress=progress, lacks=table.lacks)


def _labels(path: Path, table: ColourTable | Relabelling, size: tuple[int, int]) -> np.ndarray | str:
    """The labels of a mask, uint8 (H, W); or what is said of what the table lacks."""
    labels = table.labels_of(path)
    if any(size) and isinstance(labels, np.ndarray) and labels.shape != size:
        sizes = f"mask of {labels.shape} (height, width), its image has {size}"
        raise DataError(f"{path}: {sizes}; both need the same size.")
    return labels
