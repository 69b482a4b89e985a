"""Masks that hold colours or other numbers, converted to indexed ones: a new data set from one in VOC layout."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from segnet_scratch.data.colours import Colour, ColourTable, Found, labels_from_colours, voc_colours
from segnet_scratch.data.conversion import Pair, by_id, draw_splits, write_dataset
from segnet_scratch.data.palette import class_palette
from segnet_scratch.data.pictures import decode, label_counts, mask_labels
from segnet_scratch.data.relabel import Relabelling
from segnet_scratch.data.voc import MASK_FOLDER, SPLIT_FOLDER, VOCDataset, class_names, find_root, split_files
from segnet_scratch.errors import DataError
from segnet_scratch.files import visible_files

_FILES_NAMED = 5
_COLOURS_NAMED = 3  # of each file


def convert_masks(
    source: str | Path,
    out: str | Path,
    table: ColourTable | Relabelling | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the data set `source`, in VOC layout but with colours or other numbers in its masks, to `out`.

    table: the numbers of colours, or new ones of labels; VOC's colours for the classes of the set unless given. All
    ids that a split names are taken, images are copied, labels.txt is written. `out` appears whole or not at all.
    workers: threads, as many as cores unless given. progress is told of the masks done and their number. Returns the
    number of masks.

    Raises DataError where `out` holds something, where files are missing or damaged, and for colours that the table
    lacks: the message tells the masks, and of each colour the pixels and the first place.
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
    if isinstance(table, ColourTable):
        palette = table.palette
    else:
        palette = class_palette(table.names, splits[0].palette[list(table.kept)].tolist())
    lists = {split.split: split.ids for split in splits}
    lacking = partial(_lacking, root / MASK_FOLDER, len(pairs), isinstance(table, ColourTable))
    return write_dataset(Path(out), table.names, palette, pairs, lists, False, workers, progress, lacking)


def convert_folders(
    source: Path,
    out: Path,
    table: ColourTable | Relabelling,
    val: float,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes a folder with `images/` and `masks/`, of the same names, to `out` in VOC layout; as `convert_masks`.

    The lists are drawn: see `draw_splits`.
    """
    images, masks = ({path.stem: path for path in visible_files(source / name)} for name in ("images", "masks"))
    if alone := images.keys() ^ masks.keys():
        name = min(alone)
        raise DataError(
            f"{images.get(name) or masks[name]}: has no counterpart in {'masks' if name in images else 'images'}/ "
            f"({len(alone)} such files); add it, or move it away."
        )
    pairs = by_id({name: Pair(path, partial(_labels, masks[name], table)) for name, path in images.items()})
    palette = table.palette if isinstance(table, ColourTable) else class_palette(table.names, None)
    lacking = partial(_lacking, source / "masks", len(pairs), isinstance(table, ColourTable))
    splits = draw_splits(pairs, val, seed)
    return write_dataset(out, table.names, palette, pairs, splits, progress=progress, lacking=lacking)


def _labels(path: Path, table: ColourTable | Relabelling, size: tuple[int, int]) -> np.ndarray | str:
    """The labels of a mask, uint8 (H, W); or what is said of what the table lacks."""
    if isinstance(table, ColourTable):
        labels, missing = labels_from_colours(_colours(path), table)
        if missing:
            return _unknown(path, missing)
    else:
        labels = mask_labels(path, decode(path, "mask"))
        if wrong := np.flatnonzero(label_counts(labels) * ~table.known).tolist():
            return f"  {path.name}: {', '.join(map(str, wrong))}"
        labels = table.lookup[labels]
    if any(size) and labels.shape != size:
        raise DataError(
            f"{path}: mask of {labels.shape} (height, width), its image has {size}; both need the same size."
        )
    return labels


def _colours(path: Path) -> np.ndarray:
    """The colours that a mask shows, uint8 (H, W, 3), whatever its mode."""
    picture = decode(path, "mask")
    if picture.mode.startswith("I"):
        raise DataError(f"{path}: 16-bit grey is no colour; expected a picture of 8 bits a channel.")
    if picture.mode.endswith("A") or "transparency" in picture.info:
        alpha = np.array(picture.convert("RGBA").getchannel("A"))
        if (alpha != 255).any():
            row, column = (int(axis[0]) for axis in np.nonzero(alpha != 255))
            raise DataError(
                f"{path}: {np.count_nonzero(alpha != 255)} pixels are transparent, first at row {row}, column "
                f"{column}, so that their colour is not to be told; save the mask without transparency."
            )
    return np.array(picture.convert("RGB"))


def _unknown(path: Path, missing: Mapping[Colour, Found]) -> str:
    commonest = sorted(missing.items(), key=lambda item: -item[1][0])
    named = [
        f"{colour} (pixels: {count}, first at row {row}, column {column})"
        for colour, (count, row, column) in commonest[:_COLOURS_NAMED]
    ]
    more = f"; and {len(missing) - _COLOURS_NAMED} more colours" if len(missing) > _COLOURS_NAMED else ""
    return f"  {path.name}: {'; '.join(named)}{more}"


def _lacking(folder: Path, masks: int, colours: bool, problems: list[str]) -> DataError:
    more = [f"  and {len(problems) - _FILES_NAMED} more masks"] if len(problems) > _FILES_NAMED else []
    fix = (
        "Add the colours to the table (as void, if they mean nothing), or correct the masks: many colours at few "
        "pixels are left along borders by interpolation and by JPEG."
        if colours
        else "Say what each means, for example --relabel 7=void, or name its class in labels.txt."
    )
    what = "colours that the table lacks" if colours else "numbers that are no class"
    first = f"{folder}: {len(problems)} of {masks} masks hold {what}; nothing was written:"
    return DataError(first, *problems[:_FILES_NAMED], *more, fix)
