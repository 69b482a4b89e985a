"""`segnet data ...`: data sets in PASCAL VOC's layout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn
from rich.table import Table

from segnet_scratch.cli import options
from segnet_scratch.cli.command import command
from segnet_scratch.cli.common import app, console, fail, say
from segnet_scratch.data import VOCDataset, class_names, find_root, write_sample
from segnet_scratch.data.colours import (
    ColourTable,
    Relabelling,
    camvid_colours,
    parse_relabelling,
    read_colours,
    voc_colours,
)
from segnet_scratch.data.contact_sheet import MAX_COUNT, contact_sheet, spread
from segnet_scratch.data.conversion import by_id, convert_folders, convert_masks, draw_splits, write_dataset
from segnet_scratch.data.download.install import install_sbd, install_voc2012
from segnet_scratch.data.findings import CODES
from segnet_scratch.data.palette import class_palette, png_bytes
from segnet_scratch.data.polygons import read_coco, read_labelme
from segnet_scratch.data.statistics import ClassStatistics, class_statistics
from segnet_scratch.data.verify import Report
from segnet_scratch.data.verify import verify as run_verify
from segnet_scratch.data.voc import split_files
from segnet_scratch.display import numbers_table, write_json
from segnet_scratch.errors import DataError, printable
from segnet_scratch.files import write_durably
from segnet_scratch.progress import Watch, bar, watched

data_app = typer.Typer(help="Data sets in PASCAL VOC's layout.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Root = Annotated[Path, typer.Argument(metavar="DIR", help="A VOC root, or a folder above it.")]

_EXAMPLES = 3  # of each code
_SIZES = 3  # the commonest


@command(data_app)
def sample(directory: Path, train: options.Count = 160, val: options.Count = 40, seed: options.Number = 0) -> None:
    """Write a small synthetic data set in VOC layout: coloured shapes on textured grounds, deterministic.

    It needs no download, and a small network learns it in some minutes without a GPU:

    segnet train --data DIR --out RUN --set width=0.25 --set size=64 --set lr=0.1 --set epochs=10

    Options:
        directory: Where to write it.
        --train: Training images.
        --val: Validation images.
        --seed: Another seed gives other images.
    """
    root = write_sample(directory, train=train, val=val, seed=seed)
    say(f"{train} training and {val} validation images in {root}")


@command(data_app)
def download(
    directory: Path,
    dataset: Annotated[str, options.one_of(("voc2012", "sbd"))] = "voc2012",
    mirror: options.Texts = None,
) -> None:
    """Download PASCAL VOC2012 (2.0 GB), or SBD's masks (1.4 GB) that make 10,582 training images of its 1,464.

    An interrupted download goes on where it broke off, when the command is repeated. The archive is verified by its
    checksum before anything is unpacked, and stays in DIR. SBD ends in the list train_aug, without the images of val.

    Options:
        DIR: Where to put it.
        --dataset: sbd adds its masks to voc2012.
        --mirror URL: Address of the archive, tried before the known ones.
    """
    if dataset == "voc2012":
        with transferred(console) as progress:
            root = install_voc2012(directory, mirror or (), progress)
        splits = ", ".join(f"{split} {len(VOCDataset(root, split))}" for split in ("train", "val"))
        say(f"{root}: {splits} images; look closer with: segnet data verify {root}")
    else:
        with transferred(console) as progress:
            merge = install_sbd(directory, mirror or (), progress)
        say(f"{merge.root}: list train_aug with {merge.ids:,} images, {merge.added:,} masks added")
        say("train on it with: segnet train --set train_split=train_aug ...")


@command(data_app)
def verify(directory: Root, split: options.Texts = None, json: options.Json = None) -> None:
    """Read every image, mask and annotation, and name all that is wrong; exit code 1 where there is an error.

    Each finding has a code that never changes, such as mask-rgb or split-overlap. Warnings are legal, but seldom meant.

    Options:
        --split: A list to look at, once for each; all unless given.
    """
    with watched(console, "verify") as watch:
        report = run_verify(directory, split or (), progress=watch.update)
    console.print(facts_table(report))
    console.print(labels_table(report))
    for line, style in finding_lines(report):
        say(line, style)
    write_json(json, report.to_json())
    errors = sum(finding.is_error for finding in report.findings)
    if errors:
        fail(f"{report.root}: {errors} errors in {report.pairs} images and masks", 1)
    say(f"no errors, {len(report.findings)} warnings")


@command(data_app)
def stats(directory: Root, split: options.Split = "train", toml: Path | None = None, json: options.Json = None) -> None:
    """Count the pixels of each class, and give the paper's median-frequency weights for the loss.

    frequency = pixels of the class / pixels of the images in which it occurs, weight = median frequency / frequency.
    Void counts in neither. A class that does not occur gets weight 1.

    Options:
        --toml FILE: Write the weights as class_weights, for segnet train --config.
    """
    dataset = VOCDataset(directory, split)
    with watched(console, "count") as watch:
        statistics = class_statistics(dataset, progress=watch.update)
    console.print(statistics_table(statistics, split))
    write_json(json, {"split": split, **statistics.to_json()})
    if toml is not None:
        toml.parent.mkdir(parents=True, exist_ok=True)
        write_durably(toml, [statistics.to_toml(f"{dataset.root.name}, split {split}").encode()])
        say(f"weights in {toml}")


@command(data_app)
def show(
    directory: Root,
    out: Path,
    split: options.Split = "train",
    ids: options.Texts = None,
    count: Annotated[int, {"min": 1, "max": MAX_COUNT}] = 12,
) -> None:
    """Draw a contact sheet: images with the boxes of their annotations, masks in colours, and a legend.

    Options:
        OUT.png: The picture to write.
        --ids: An image to show, once for each.
        --count: Images, evenly spread over the list.
    """
    dataset = VOCDataset(directory, split)
    places = {name: index for index, name in enumerate(dataset.ids)}
    if unknown := [name for name in ids or () if name not in places]:
        raise DataError(f"{dataset.root}: split '{split}' has no image '{unknown[0]}'; take one of its {len(dataset)}.")
    indices = [places[name] for name in ids] if ids else spread(len(dataset), count)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, [png_bytes(contact_sheet(dataset, indices))])
    say(f"{len(indices)} of the {len(dataset)} images of {split} in {out}")


@command(data_app, "convert-masks", hidden=True)  # what it was called when it took masks alone
@command(data_app)
def convert(
    source: Annotated[Path, {"exists": True}],
    out: options.Folder,
    labels: Annotated[Path | None, {"dir_okay": False, "exists": True}] = None,
    images: Annotated[Path | None, {"exists": True}] = None,
    val: float = 0.2,
    seed: options.Number = 0,
    colours: str | None = None,
    relabel: str | None = None,
) -> None:
    """Make a data set in VOC layout of masks (numbers or colours) or of outlines drawn with LabelMe, CVAT and others.

    Examples: segnet data convert annotations/ DATA

    segnet data convert instances.json DATA --images photos --val 0.3

    What cannot be meant is an error that names the file and the entry, and nothing is written.

    Options:
        source: A VOC root, a folder with images/ and masks/, one with LabelMe's JSON files, or COCO's JSON file.
        OUT: Folder of the new data set.
        --labels FILE: The classes, one a line; those that occur unless given.
        --images DIR: Where the images of outlines lie, if not beside them.
        --val: Share of the images for validation, where there are no lists.
        --seed: Of the draw of these.
        --colors FILE|voc|camvid: Masks hold colours; which class each is: a file with lines of 'name r g b' (void for
            none), VOC's (of a VOC root unless given), or CamVid's 32 as its usual 11 classes.
        --relabel OLD=NEW,...: Masks hold numbers, and these get others: 255=1, unlabelled=void, or 0=void,1=0,2=1.
    """
    folders = all((source / name).is_dir() for name in ("images", "masks"))
    masks = folders or (source / "SegmentationClass").is_dir()  # other JSON may lie beside them
    outlines = source.is_file() or (not masks and any(file.suffix.lower() == ".json" for file in source.iterdir()))
    given = class_names(labels.parent, labels.name) if labels else None
    with watched(console, "convert") as watch:
        if outlines:
            names, pairs = (read_coco if source.is_file() else read_labelme)(source, given, images)
            pairs = by_id(pairs)
            splits = draw_splits(pairs, val, seed)
            count = write_dataset(out, names, class_palette(names), pairs, splits, progress=watch.update)
        else:
            root = source if folders else find_root(source)
            if folders and not (given or colours or (root / "labels.txt").is_file()):
                raise DataError(
                    f"{root}: no labels.txt says what the numbers in masks mean; give --labels or --colors."
                )
            known = given or class_names(root)
            table: ColourTable | Relabelling
            if relabel or (folders and not colours):
                table = parse_relabelling(relabel or "0=0", known)
            else:
                tables = {"voc": lambda: voc_colours(known), "camvid": camvid_colours}
                table = tables.get(colours or "voc", lambda: read_colours(colours or ""))()
            if folders:
                count = convert_folders(root, out, table, val, seed, watch.update)
            else:
                count = convert_masks(root, out, table, progress=watch.update)
    found = {split: len(VOCDataset(out, split)) for split in split_files(out)}
    say(f"{count} masks in {out}: {', '.join(f'{split} {images}' for split, images in found.items())} images")
    say(f"classes: {', '.join(class_names(out))}; look closer with: segnet data verify {out}")


@contextmanager
def transferred(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of each stage of an installation, with bytes, rate and time left; gives (stage, done, total)."""
    with bar(console, DownloadColumn(), TransferSpeedColumn(), transient=False) as progress:
        watches: dict[str, Watch] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in watches:
                watches[what] = Watch(console, progress, what, total)
                if not console.is_terminal:
                    console.print(f"{what} ...")
            watches[what].update(done, total)

        yield report


def facts_table(report: Report) -> Table:
    """How much there is of everything."""
    table = Table(title=printable(str(report.root)), show_header=False)
    table.add_row("ids", ", ".join(f"{printable(split)} {count}" for split, count in report.splits.items()) or "-")
    sizes = [f"{width} x {height}: {count}" for (height, width), count in report.sizes.most_common(_SIZES)]
    more = [f"{len(report.sizes) - _SIZES} other sizes"] if len(report.sizes) > _SIZES else []
    table.add_row("images", f"{report.sizes.total()} of {report.pairs} readable")
    table.add_row("width x height", ", ".join([*sizes, *more]) or "-")
    table.add_row("image modes", ", ".join(f"{mode} {count}" for mode, count in report.image_modes.items()) or "-")
    table.add_row("mask modes", ", ".join(f"{mode} {count}" for mode, count in report.mask_modes.items()) or "-")
    table.add_row("void", f"{100 * report.void_share:.2f} % of the pixels")
    table.add_row("in no list", ", ".join(f"{count} files in {folder}" for folder, count in report.unlisted.items()))
    return table


def labels_table(report: Report) -> Table:
    """Share of pixels (void left out) and number of masks by class."""
    table = numbers_table("class", "pixels %", "masks", first="label")
    pixels = report.pixels[: len(report.names)]
    for label, (name, share) in enumerate(zip(report.names, pixels / max(1, int(pixels.sum())), strict=True)):
        table.add_row(str(label), printable(name), f"{100 * share:.3f}", str(report.images[label]))
    return table


def finding_lines(report: Report) -> Iterator[tuple[str, str]]:
    """Lines with their styles: each code with its meaning and number, below it the first findings."""
    for code, findings in report.by_code().items():
        kind, style = ("error", "bold red") if findings[0].is_error else ("warning", "yellow")
        yield f"{kind} {code}: {CODES[code]} ({len(findings)})", style
        for finding in findings[:_EXAMPLES]:
            yield printable(f"  {finding.path}: {finding.detail}"), ""
        if len(findings) > _EXAMPLES:
            yield f"  and {len(findings) - _EXAMPLES} more", ""


def statistics_table(statistics: ClassStatistics, split: str) -> Table:
    """Pixels, masks, frequency and weight by class."""
    table = numbers_table("class", "pixels", "%", "masks", "frequency", "weight", first="#")
    table.title = f"{split}: {statistics.masks} masks, {statistics.void:,} pixels void"
    columns = ("names", "pixels", "share", "images", "frequency", "weights")
    rows = zip(*(getattr(statistics, column) for column in columns), strict=True)
    for label, (name, pixels, share, images, frequency, weight) in enumerate(rows):
        seen = "-" if np.isnan(frequency) else f"{frequency:.5f}"
        table.add_row(str(label), name, f"{pixels:,}", f"{100 * share:.3f}", str(images), seen, f"{weight:.4f}")
    return table
