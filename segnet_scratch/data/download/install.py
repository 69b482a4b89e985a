"""From nothing to a data set in a folder, or to VGG16's weights: room, download, checksum, unpacking."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from segnet_scratch.config import PRETRAINED
from segnet_scratch.data.download.fetch import Progress, fetch, silent
from segnet_scratch.data.download.sbd import Merge, merge_sbd
from segnet_scratch.data.download.sources import SBD, VOC2012, Source, read_files
from segnet_scratch.data.voc import VOCDataset, find_root
from segnet_scratch.errors import DataError
from segnet_scratch.files import atomic_folder
from segnet_scratch.runtime.cache import cache_directory

_WEIGHTS = "https://download.pytorch.org/models/"  # torchvision's
_MARGIN = 200_000_000  # bytes left free, so that the machine stays usable


def install_voc2012(
    directory: str | Path, mirrors: Sequence[str] = (), progress: Progress = silent, source: Source = VOC2012
) -> Path:
    """Downloads VOC2012 into `directory` and returns its root, `directory`/VOCdevkit/VOC2012.

    mirrors: addresses of the archive to try before the known ones. An archive that lies in `directory` is used, and
    stays there. The root appears whole or not at all; where it is there already it is only looked over. Raises
    DataError where no mirror delivers, where room is short, and where a root is there that is not whole.
    """
    directory = Path(directory)
    root = directory / source.prefix
    if root.exists():
        if fault := _fault(root):
            raise DataError(*fault.split("\n"), f"The data set is not whole; move {root} away and download it again.")
        return root
    archive = _archive(directory, source, mirrors, progress)
    with atomic_folder(root) as folder:
        files = read_files(archive, source, partial(progress, "unpack"))
        for name in source.wanted:
            (folder / name).mkdir(parents=True)
        for name, content in files:
            # "x": an existing file, or a link however it came there, is never written through.
            with (folder / name).open("xb") as stream:
                stream.write(content)
        if fault := _fault(folder):
            raise DataError(f"{archive}: holds no whole data set: {fault.replace(str(folder), str(root))}")
    return root


def install_sbd(
    directory: str | Path, mirrors: Sequence[str] = (), progress: Progress = silent, source: Source = SBD
) -> Merge:
    """Downloads SBD into `directory` and adds its masks to the VOC2012 that is there, see `merge_sbd`.

    Raises DataError where there is no VOC2012, and as `install_voc2012` does.
    """
    try:
        root = find_root(directory)
    except DataError as error:
        raise DataError(*error.args, "SBD adds masks to VOC2012: download that into the same folder first.") from error
    archive = _archive(Path(directory), source, mirrors, progress)
    return merge_sbd(archive, root, source, partial(progress, "convert"))


def _archive(directory: Path, source: Source, mirrors: Sequence[str], progress: Progress) -> Path:
    """The verified archive in `directory`, downloaded if it is not there and there is room for all that follows."""
    archive = directory / source.file
    there = sum(path.stat().st_size for path in (archive, archive.with_name(archive.name + ".part")) if path.is_file())
    needed = max(0, source.size - there) + source.room + _MARGIN
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        sizes = [f"{size / 1e9:.1f}" for size in (needed, source.size, there, source.room, free)]
        room = "{} GB of free space expected ({} for the archive less {} that are there, {} for its files), got {} GB"
        raise DataError(f"{directory}: {room.format(*sizes)}; make room, or choose a folder on another disk.")
    fetch((*mirrors, *source.urls), archive, f"md5:{source.md5}", source.size, progress)
    return archive


def _fault(root: Path) -> str:
    """What the lists for training and validation, or the files that they name, lack; empty where all are there."""
    try:
        for split in ("train", "val"):
            VOCDataset(root, split)
    except DataError as error:
        return str(error)
    return ""


def pretrained_file(init: str, progress: Progress = silent) -> Path:
    """The file that the setting `init` means, downloaded and verified if it is one of PRETRAINED and not there yet.

    Those lie in the user's cache folder.

    DataError, with the addresses and the place to put the file, where it cannot be had.
    """
    if init not in PRETRAINED:
        return Path(init)
    name, size = PRETRAINED[init]
    target = cache_directory() / "weights" / name
    digits = name.removesuffix(".pth").rpartition("-")[2]
    fetch([_WEIGHTS + name], target, f"sha256:{digits}", size, progress, fix="start from another file: --init FILE")
    return target
