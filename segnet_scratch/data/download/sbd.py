"""SBD (Hariharan et al. 2011): masks for 11,355 images of VOC, merged into VOC2012 as the list train_aug.

SBD's own lists are of no use here: its train overlaps VOC's val. Everything that VOC's val names is left out, which
leaves the 10,582 images of training that the literature calls train_aug (VOC's 1,464 and 9,118 of SBD's).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from segnet_scratch.data.download.archive import read_files
from segnet_scratch.data.download.sources import Source
from segnet_scratch.data.loader import ordered_map
from segnet_scratch.data.palette import indexed_picture, png_bytes
from segnet_scratch.data.voc import IMAGE_FOLDER, MASK_FOLDER, SPLIT_FOLDER, find_image, mask_file, read_split
from segnet_scratch.errors import DataError
from segnet_scratch.files import reason, sweep_temporaries, write_durably

SPLIT = "train_aug"
"""The list that is written."""

_CLASSES = 21


@dataclass(frozen=True)
class Merge:
    """root: of the VOC2012 merged into. ids: in the list. added: masks written by this merge."""

    root: Path
    ids: int
    added: int


def merge_sbd(
    archive: Path,
    root: Path,
    source: Source,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merge:
    """Adds the masks of SBD's archive to the VOC2012 at `root`, and the list train_aug.

    A mask or image that is there stays as it is, so VOC's own masks go before SBD's. Every file appears whole or not
    at all, the list last; an interrupted merge is completed by the next. Raises DataError for an archive that is not
    SBD's, for a damaged mask, and where scipy, which reads MATLAB's files, is not installed.
    """
    loadmat = _matlab_reader()
    train, val = read_split(root, "train"), set(read_split(root, "val"))
    listed: set[str] = set()
    found: set[str] = set()
    try:
        for folder in (root / IMAGE_FOLDER, root / MASK_FOLDER):
            sweep_temporaries(folder)

        def jobs() -> Iterator[tuple[str, str, bytes]]:
            for path, content in read_files(archive, source.prefix, source.wanted, source.limit, progress):
                name = PurePosixPath(path)
                if name.suffix == ".txt":
                    if name.stem in ("train", "val"):
                        listed.update(content.decode("utf-8", "replace").split())
                    continue
                if name.suffix == ".mat":
                    found.add(name.stem)
                if name.stem not in val:
                    yield name.suffix, name.stem, content

        workers = os.cpu_count() or 1
        with closing(ordered_map(partial(_add, archive, root, loadmat), jobs(), workers, ahead=8 * workers)) as results:
            added = sum(results)
        if not listed or listed - found:
            raise DataError(
                f"{archive}: {len(listed - found)} of the {len(listed)} ids in its lists have no mask; expected SBD's "
                f"{source.file}, with lists and a mask for each id."
            )
        ids = [*train, *sorted(found - val - set(train))]
        _check_pairs(root, ids)
        os.sync()  # some ten thousand files at once; before the list, which says that they are there
        write_durably(root / SPLIT_FOLDER / f"{SPLIT}.txt", ["".join(f"{name}\n" for name in ids).encode()])
    except OSError as error:
        raise DataError(f"{error.filename or root}: {reason(error)}.") from error
    return Merge(root, len(ids), added)


def _matlab_reader() -> Callable[..., dict[str, Any]]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"SBD's masks are MATLAB files, which scipy reads, and that cannot be imported ({error}); "
            "pip install 'segnet_scratch[sbd]'."
        ) from error
    return loadmat


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
        labels = loadmat(BytesIO(content), variable_names=("GTcls",))["GTcls"]["Segmentation"][0, 0]
        labels = np.asarray(labels)
    except Exception as error:  # damage is met with almost any type
        raise DataError(f"{where}: no class map of SBD ({error}); download the archive again.") from error
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        raise DataError(f"{where}: expected a map of class numbers, got {labels.dtype} {labels.shape}.")
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise DataError(f"{where}: labels {labels.min()}..{labels.max()}; expected 0..{_CLASSES - 1}.")
    return labels.astype(np.uint8)


def _check_pairs(root: Path, ids: list[str]) -> None:
    for name in ids:
        image, mask = find_image(root, name), mask_file(root, name)
        sizes = []
        for path in (image, mask):
            try:
                with Image.open(path, formats=("JPEG", "PNG")) as picture:
                    sizes.append(picture.size)
            except Exception as error:
                raise DataError(f"{path}: cannot be read ({error}); download the data set again.") from error
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{mask}: mask of {sizes[1]} for an image of {sizes[0]} pixels ({image}); are both of VOC2012?"
            )
