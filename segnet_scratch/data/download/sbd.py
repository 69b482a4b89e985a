"""SBD (Hariharan et al. 2011): masks for 11,355 images of VOC, merged into VOC2012 as the list train_aug.

SBD's own lists are of no use here: its train overlaps VOC's val. Everything that VOC's val names is left out, which
leaves the 10,582 images of training that the literature calls train_aug (VOC's 1,464 and 9,118 of SBD's).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from segnet_scratch.data.download.sources import Source, read_files
from segnet_scratch.data.loader import Progress, ordered_map, silent
from segnet_scratch.data.palette import indexed_picture, png_bytes
from segnet_scratch.data.voc import FOLDERS, SPLIT_FOLDER, check_sizes, find_image, mask_file, read_split
from segnet_scratch.errors import DataError, require
from segnet_scratch.files import sweep_temporaries, write_durably
from segnet_scratch.runtime.workers import worker_count

# The list that is written.
SPLIT = "train_aug"

_CLASSES = 21


class Merge(NamedTuple):
    """root: of the VOC2012 merged into. ids: in the list. added: masks written by this merge."""

    root: Path
    ids: int
    added: int


def merge_sbd(archive: Path, root: Path, source: Source, progress: Progress = silent) -> Merge:
    """Adds the masks of SBD's archive to the VOC2012 at `root`, and the list train_aug.

    A mask or image that is there stays as it is, so VOC's own masks go before SBD's. Every file appears whole or not
    at all, the list last; an interrupted merge is completed by the next. Raises DataError for an archive that is not
    SBD's, and for a damaged mask; MissingLibraryError where scipy, which reads MATLAB's files, is not installed.
    """
    loadmat = require("scipy.io", "sbd", "SBD's masks, which are MATLAB files").loadmat
    train, val = read_split(root, "train"), set(read_split(root, "val"))
    listed: set[str] = set()
    found: set[str] = set()
    for folder in FOLDERS:
        sweep_temporaries(root / folder)

    def jobs() -> Iterator[tuple[str, str, bytes]]:
        for path, content in read_files(archive, source, progress):
            name = PurePosixPath(path)
            if name.suffix == ".txt":
                if name.stem in ("train", "val"):
                    listed.update(content.decode("utf-8", "replace").split())
                continue
            if name.suffix == ".mat":
                found.add(name.stem)
            if name.stem not in val:
                yield name.suffix, name.stem, content

    workers = worker_count()
    with closing(ordered_map(partial(_add, archive, root, loadmat), jobs(), workers, ahead=8 * workers)) as results:
        added = sum(results)
    if not listed or listed - found:
        what = f"{len(listed - found)} of the {len(listed)} ids in its lists have no mask"
        raise DataError(f"{archive}: {what}; expected SBD's {source.file}, with lists and a mask for each id.")
    ids = [*train, *sorted(found - val - set(train))]
    for name in ids:
        image, mask = find_image(root, name), mask_file(root, name)
        check_sizes(image, _size(image), mask, _size(mask))
    os.sync()  # some ten thousand files at once; before the list, which says that they are there
    write_durably(root / SPLIT_FOLDER / f"{SPLIT}.txt", ["".join(f"{name}\n" for name in ids).encode()])
    return Merge(root, len(ids), added)


def _add(archive: Path, root: Path, loadmat: Callable[..., dict[str, Any]], job: tuple[str, str, bytes]) -> int:
    """Writes one image (.jpg) or mask (.mat), given as suffix, id and content, if there is none; 1 for a mask."""
    suffix, name, content = job
    target = find_image(root, name) if suffix == ".jpg" else mask_file(root, name)
    if target.is_file():
        return 0
    if suffix == ".jpg":
        write_durably(target, [content], synced=False)
        return 0
    labels = _labels(f"{archive}: {name}.mat", loadmat, content)
    write_durably(target, [png_bytes(indexed_picture(labels))], synced=False)
    return 1


def _labels(where: str, loadmat: Callable[..., dict[str, Any]], content: bytes) -> np.ndarray:
    """The class map in one of SBD's .mat files, uint8 (H, W), labels 0..20."""
    try:
        labels = np.asarray(loadmat(BytesIO(content), variable_names=("GTcls",))["GTcls"]["Segmentation"][0, 0])
        values = f"{labels.min()}..{labels.max()}" if labels.size else "nothing"
    except Exception as error:  # damage is met with almost any type
        raise DataError(f"{where}: no class map of SBD ({error}); download the archive again.") from error
    whole = labels.ndim == 2 and labels.size and np.issubdtype(labels.dtype, np.integer)
    if not whole or not np.isin(labels, range(_CLASSES)).all():
        got = f"{labels.dtype} {labels.shape} with {values}"
        raise DataError(f"{where}: expected a map of class numbers 0..{_CLASSES - 1}, got {got}.")
    return labels.astype(np.uint8)


def _size(path: Path) -> tuple[int, int]:
    """(height, width), by the header."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            return picture.height, picture.width
    except Exception as error:
        raise DataError(f"{path}: cannot be read ({error}); download the data set again.") from error
