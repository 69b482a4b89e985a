"""Masks that hold colours, converted to indexed ones: a new data set from one in VOC layout."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from segnet_scratch.data.colours import Colour, ColourTable, Found, labels_from_colours, voc_colours
from segnet_scratch.data.loader import ordered_map
from segnet_scratch.data.palette import class_palette, save_indexed_png
from segnet_scratch.data.pictures import decode, label_counts, mask_labels
from segnet_scratch.data.relabel import Relabelling
from segnet_scratch.data.voc import (
    FOLDERS,
    IMAGE_FOLDER,
    MASK_FOLDER,
    SPLIT_FOLDER,
    VOCDataset,
    class_names,
    find_root,
    split_files,
)
from segnet_scratch.errors import DataError
from segnet_scratch.files import reason, whole_folder

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
    root, out = find_root(source), Path(out)
    table = table or voc_colours(class_names(root))
    splits = [VOCDataset(root, split) for split in split_files(root)]
    if not splits:
        raise DataError(f"{root / SPLIT_FOLDER}: expected lists such as train.txt, got none; name the images in one.")
    pairs = {
        name: (split.image_path(index), split.mask_path(index))
        for split in splits
        for index, name in enumerate(split.ids)
    }
    workers = workers if workers is not None else os.cpu_count() or 1
    problems: list[str] = []
    try:
        with whole_folder(out) as folder:
            for name in FOLDERS:
                (folder / name).mkdir(parents=True)
            palette = _palette(splits[0], table)
            convert = partial(_convert, folder, table, palette)
            with closing(ordered_map(convert, pairs.values(), workers, ahead=4 * workers)) as results:
                for done, problem in enumerate(results, start=1):
                    problems += [problem] if problem else []
                    progress(done, len(pairs))
            if problems:
                raise _lacking(root / MASK_FOLDER, problems, len(pairs), isinstance(table, ColourTable))
            for split in splits:
                path = folder / SPLIT_FOLDER / f"{split.split}.txt"
                path.write_text("\n".join(split.ids) + "\n", encoding="utf-8")
            (folder / "labels.txt").write_text("\n".join(table.names) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{error.filename2 or error.filename or out}: {reason(error)}.") from error
    return len(pairs)


def _palette(dataset: VOCDataset, table: ColourTable | Relabelling) -> np.ndarray:
    """The colours of the new labels, uint8 (256, 3)."""
    if isinstance(table, ColourTable):
        return table.palette
    return class_palette(table.names, dataset.palette[list(table.kept)].tolist())


def _convert(folder: Path, table: ColourTable | Relabelling, palette: np.ndarray, paths: tuple[Path, Path]) -> str:
    """Copies the image and writes the mask into `folder`; returns what is said of what the table lacks."""
    image, mask = paths
    shutil.copyfile(image, folder / IMAGE_FOLDER / image.name)
    if isinstance(table, ColourTable):
        labels, missing = labels_from_colours(_colours(mask), table)
        if missing:
            return _unknown(mask, missing)
    else:
        labels = mask_labels(mask, decode(mask, "mask"))
        if wrong := np.flatnonzero(label_counts(labels) * ~table.known).tolist():
            return f"  {mask.name}: {', '.join(map(str, wrong))}"
        labels = table.lookup[labels]
    save_indexed_png(folder / MASK_FOLDER / mask.name, labels, palette)
    return ""


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


def _lacking(folder: Path, problems: list[str], masks: int, colours: bool) -> DataError:
    more = [f"  and {len(problems) - _FILES_NAMED} more masks"] if len(problems) > _FILES_NAMED else []
    fix = (
        "Add the colours to the table (as void, if they mean nothing), or correct the masks: many colours at few "
        "pixels are left along borders by interpolation and by JPEG."
        if colours
        else "Say what each means, for example --relabel 7=void, or name its class in labels.txt."
    )
    what = "colours that the table lacks" if colours else "numbers that are no class"
    lines = [
        f"{folder}: {len(problems)} of {masks} masks hold {what}; nothing was written:",
        *problems[:_FILES_NAMED],
        *more,
        fix,
    ]
    return DataError("\n".join(lines))
