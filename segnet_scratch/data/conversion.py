"""A new data set in VOC layout from one of another kind: images, masks, lists and names, whole or not at all."""

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from segnet_scratch.data.colours import ColourTable, Relabelling
from segnet_scratch.data.loader import Progress, parallel_map, silent
from segnet_scratch.data.palette import save_indexed_png
from segnet_scratch.data.pictures import orientation, read_image
from segnet_scratch.data.voc import FOLDERS, IMAGE_FOLDER, SPLIT_FOLDER, VOCDataset, find_root, mask_file, split_files
from segnet_scratch.errors import DataError, some_of
from segnet_scratch.files import atomic_folder, visible_files


class Pair(NamedTuple):
    """An image, and what makes the mask of an image of a size (height, width): uint8, or in words why it cannot."""

    image: Path
    mask: Callable[[tuple[int, int]], np.ndarray | str]


def write_dataset(
    out: Path,
    names: Sequence[str],
    palette: np.ndarray,
    pairs: Mapping[str, Pair],
    splits: Mapping[str, Sequence[str]],
    upright: bool = True,
    progress: Progress = silent,
    lacks: tuple[str, str] = ("", ""),
) -> int:
    """Writes these pairs, by id, to `out`, which appears whole or not at all; returns their number.

    palette: colours of the labels, uint8 (256, 3). splits: ids by the name of their list. upright: images are turned as
    their EXIF data ask for, as every program shows them in which masks are drawn; what is no JPEG or PNG becomes one.
    Else they are copied, and masks are asked for the size (0, 0), which is any. lacks: what masks may hold that is not
    known, and the fix.
    Raises DataError for files that cannot be read, and of masks that say why they cannot be made; OSError where the
    system refuses to write.
    """

    def convert(item: tuple[str, Pair]) -> str:
        name, pair = item
        size = _write_upright(pair.image, folder / IMAGE_FOLDER, name) if upright else (0, 0)
        if not upright:
            shutil.copyfile(pair.image, folder / IMAGE_FOLDER / pair.image.name)
        labels = pair.mask(size)
        if isinstance(labels, str):
            return labels
        save_indexed_png(mask_file(folder, name), labels, palette)
        return ""

    with atomic_folder(out) as folder:
        for part in FOLDERS:
            (folder / part).mkdir(parents=True)
        if problems := [*filter(None, parallel_map(convert, pairs.items(), progress=progress))]:
            what = f"{len(problems)} of {len(pairs)} masks hold {lacks[0]}"
            raise DataError(f"{what}; nothing was written, {out} is not there:", *some_of(problems), lacks[1])
        for split, ids in splits.items():
            (folder / SPLIT_FOLDER / f"{split}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
        (folder / "labels.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return len(pairs)


def draw_splits(ids: Iterable[str], val: float, seed: int) -> dict[str, list[str]]:
    """Lists train, val and trainval: a share `val` of the ids, drawn by `seed`, is for validation, at least one."""
    ids = sorted(ids)
    count = max(1, round(val * len(ids)))
    if not 0 < val < 1 or count >= len(ids):
        raise DataError(f"a share of {val} of {len(ids)} images for validation: expected some, and not all.")
    chosen = set(np.random.default_rng(seed).permutation(ids)[:count])
    parts = {"train": [name for name in ids if name not in chosen], "val": [name for name in ids if name in chosen]}
    return {**parts, "trainval": ids}


def by_id(images: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs by ids fit for lists: what may not stand in one becomes `_`. DataError where two become one."""
    found: dict[str, Pair] = {}
    for name, pair in images.items():
        new = re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_"
        if new in found:
            raise DataError(f"{pair.image}: its id would be {new}, as that of {found[new].image}; rename one of them.")
        found[new] = pair
    return found


def _write_upright(source: Path, folder: Path, name: str) -> tuple[int, int]:
    """Copies a JPEG or PNG that stands upright, makes a PNG of any other picture; returns (height, width)."""
    pixels = read_image(source, for_prediction=True)
    with Image.open(source) as picture:
        kind = picture.format if orientation(picture)[0] == 1 else ""
    if kind in ("JPEG", "PNG"):
        shutil.copyfile(source, folder / f"{name}.{'jpg' if kind == 'JPEG' else 'png'}")
    else:
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return pixels.shape[0], pixels.shape[1]


def convert_masks(
    source: str | Path, out: str | Path, table: ColourTable | Relabelling, progress: Progress = silent
) -> int:
    """Writes the data set `source`, in VOC layout but with colours or other numbers in its masks, to `out`.

    table: the numbers of colours, or new ones of labels. All ids that a split names are taken, images are copied,
    labels.txt is written. `out` appears whole or not at all. progress is told of the masks done and their number.
    Returns the number of masks.

    Raises DataError where `out` holds something, where files are missing or damaged, and for what the table lacks: the
    message tells the masks, and of each colour the pixels and the first place. OSError where the system refuses to
    write.
    """
    root = find_root(source)
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
