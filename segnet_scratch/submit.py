"""The results archive of the VOC2012 segmentation challenge: indexed PNGs in the folders that its server expects."""

import tarfile
from collections.abc import Callable
from contextlib import closing
from enum import StrEnum
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image

from segnet_scratch.data import VOC_CLASSES, VOCDataset, indexed_picture, ordered_map, read_image, voc_palette
from segnet_scratch.errors import ConfigError, DataError
from segnet_scratch.files import scratch_folder
from segnet_scratch.inference import Segmented, Segmenter
from segnet_scratch.segnet import SegNet

_Mode = Literal["w", "w:gz"]
_ARCHIVES: dict[str, _Mode] = {".tar": "w", ".tgz": "w:gz", ".tar.gz": "w:gz"}


class Competition(StrEnum):
    """What a network may have been trained with: comp5, VOC2012's own data; comp6, any data."""

    comp5 = "comp5"
    comp6 = "comp6"


def submit(
    segmenter: Segmenter,
    dataset: VOCDataset,
    out: Path,
    competition: Competition,
    advance: Callable[[int], None] = lambda images: None,
) -> PurePosixPath:
    """Segments every image of a split and writes `results/VOC2012/Segmentation/COMPETITION_SPLIT_cls/ID.png`.

    Into a tar archive where `out` ends in .tar, .tgz or .tar.gz, else into a folder. Every file is read again from what
    was written and checked (`check_results`) before it appears under its name. The data set needs no masks. Returns the
    path of the folder within `out`.

    Raises DataError for a model or data set of other classes than VOC's, and for an `out` that holds results already.
    """
    _check_classes(segmenter.model, dataset)
    folder = PurePosixPath("results", "VOC2012", "Segmentation", f"{competition.value}_{dataset.split}_cls")
    mode = next((mode for ending, mode in _ARCHIVES.items() if out.name.lower().endswith(ending)), None)
    if mode is None and out.suffix and not out.is_dir():
        raise ConfigError(f"{out}: the server takes a tar archive: name it NAME.tar or NAME.tgz, or name a folder")
    final = out if mode else out / "results"
    if final.exists():
        raise DataError(f"{final}: is there already; remove it or choose another --out")
    with scratch_folder(final) as scratch:
        target = scratch / folder
        target.mkdir(parents=True)

        def load(index: int) -> tuple[str, np.ndarray]:
            return dataset.ids[index], read_image(dataset.image_path(index))

        def save(result: Segmented[str]) -> tuple[str, tuple[int, ...]]:
            name, _, found = result
            indexed_picture(found.labels).save(target / f"{name}.png", format="PNG")
            return name, found.labels.shape

        sizes, threads = {}, segmenter.workers
        results = segmenter.stream(range(len(dataset.ids)), load)
        with closing(results), closing(ordered_map(save, results, threads, ahead=2 * threads)) as saved:
            for name, shape in saved:
                sizes[name] = shape
                advance(1)
        whole = scratch / ("packed.tar" if mode else "results")
        if mode is not None:
            _pack(whole, mode, folder, target, dataset.ids)
        files = _unpack(whole, folder) if mode else {path.stem: path.read_bytes() for path in target.iterdir()}
        check_results(files, sizes, out)
        whole.replace(final)
    return folder


def check_results(files: dict[str, bytes], sizes: dict[str, tuple[int, ...]], where: Path) -> None:
    """DataError unless these PNG files, by image id, are what the VOC server takes for images of these sizes.

    That is: one file for every image, indexed (mode P) with VOC's palette, as large as the image, labels below 21.
    """
    if files.keys() != sizes.keys():
        missing, unknown = sorted(sizes.keys() - files.keys()), sorted(files.keys() - sizes.keys())
        some = ", ".join((missing + unknown)[:3])
        raise DataError(f"{where}: {len(missing)} results are missing, {len(unknown)} too many ({some}, ...)")
    for name, content in files.items():
        try:
            picture = Image.open(BytesIO(content), formats=["PNG"])
            labels = np.asarray(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{where}: {name}.png cannot be read back ({error}); check the disk") from error
        palette = picture.getpalette()
        if picture.mode != "P" or palette != voc_palette().reshape(-1).tolist():
            raise DataError(f"{where}: {name}.png is of mode {picture.mode}, expected P with VOC's palette")
        if labels.shape != sizes[name]:
            raise DataError(f"{where}: {name}.png is {labels.shape}, its image {sizes[name]} (height, width)")
        if labels.max() >= len(VOC_CLASSES):
            raise DataError(f"{where}: {name}.png holds label {labels.max()}, expected 0..{len(VOC_CLASSES) - 1}")


def _check_classes(model: SegNet, dataset: VOCDataset) -> None:
    """DataError unless both have VOC's 21 classes, in VOC's order: the server knows labels, not names."""
    trained = tuple(model.metadata.get("classes", ()))
    for what, names in ((f"{dataset.root}: the data set", dataset.names), ("the checkpoint", trained)):
        if names and tuple(names) != VOC_CLASSES:
            theirs, vocs = (f"{len(some)} classes ({', '.join(some[:3])}, ...)" for some in (names, VOC_CLASSES))
            raise DataError(f"{what} has {theirs}; VOC's server takes its own {vocs}; train on those")
    if model.classes != len(VOC_CLASSES):
        raise DataError(f"the checkpoint has {model.classes} classes, VOC {len(VOC_CLASSES)}; train one on VOC's")


def _pack(packed: Path, mode: _Mode, folder: PurePosixPath, files: Path, names: tuple[str, ...]) -> None:
    """A tar archive of the results in the order of the split; the same results give the same bytes (without gzip)."""
    with tarfile.open(packed, mode, format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            content = (files / f"{name}.png").read_bytes()
            entry = tarfile.TarInfo(str(folder / f"{name}.png"))
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, BytesIO(content))


def _unpack(packed: Path, folder: PurePosixPath) -> dict[str, bytes]:
    """The content of every file of the archive that lies in the folder, by its name without the ending."""
    with tarfile.open(packed) as archive:
        inside = [(PurePosixPath(entry.name), archive.extractfile(entry)) for entry in archive]
        return {path.stem: stream.read() for path, stream in inside if stream is not None and path.parent == folder}
