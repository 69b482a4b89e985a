"""What a data set is made of, before any picture is opened: root, class names, lists of ids and how they overlap."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from segnet_scratch.data.findings import Tell
from segnet_scratch.data.lists import is_plain_name, parse_labels, parse_split
from segnet_scratch.data.voc import FOLDERS, SPLIT_FOLDER, find_root, lacking_folders, split_files
from segnet_scratch.errors import DataError

_NAMED_AT_MOST = 5


def examine_layout(
    path: Path, wanted: Sequence[str], found: Tell
) -> tuple[Path, tuple[str, ...], dict[str, list[str]]]:
    """Root, names of the classes, and ids by split, of those `wanted` or all, of the data set that `path` means.

    Raises DataError where nothing there resembles a data set, and for a wanted split that does not exist.
    """
    root = _root(path, found)
    names, _ = parse_labels(root, found=found)
    folder, files = root / SPLIT_FOLDER, split_files(root)
    for split in wanted or files:
        if split not in files:
            raise DataError(f"{folder / split}.txt: there is no split '{split}'; there are: {', '.join(files) or '-'}.")
        if not is_plain_name(split):
            found("split-name", files[split], "rename the list, without blanks or special marks.")
    splits = {split: parse_split(files[split], found) for split in wanted or files}
    if not splits and folder.is_dir():
        found("no-splits", folder, "expected lists such as train.txt and val.txt, got none.")
    _examine_overlaps(folder, splits, found)
    return root, names, splits


def purpose(split: str) -> str | None:
    """What a split is for by VOC's names: "train", or "score" (val..., test...); None for others.

    trainval is both by definition, so that it overlaps with neither.
    """
    if split.startswith("train") and not split.startswith("trainval"):
        return "train"
    return "score" if split.startswith(("val", "test")) else None


def _root(path: Path, found: Tell) -> Path:
    try:
        return find_root(path)
    except DataError:
        # Something incomplete is still examined; only where nothing is like a data set there is nothing to examine.
        missing = lacking_folders(path)
        root = min(missing, key=lambda candidate: len(missing[candidate]))
        if len(missing[root]) == len(FOLDERS):
            raise
        for folder in missing[root]:
            found("missing-folder", root / folder, "no such folder.")
        return root


def _examine_overlaps(folder: Path, splits: dict[str, list[str]], found: Tell) -> None:
    """Tells of ids in lists for training and for scoring, and of those that differ in case only."""
    for train, score in product(splits, splits):
        shared = sorted({*splits[train]} & {*splits[score]})
        if shared and (purpose(train), purpose(score)) == ("train", "score"):
            named = ", ".join(shared[:_NAMED_AT_MOST]) + (", ..." if len(shared) > _NAMED_AT_MOST else "")
            detail = f"{len(shared)} of its {len(splits[train])} ids stand in {score}.txt too ({named})"
            fix = "a network is not to be scored on what it was trained on: take them out of one."
            found("split-overlap", folder / f"{train}.txt", f"{detail}; {fix}")
    seen: dict[str, tuple[str, str]] = {}
    for split, name in ((split, name) for split, ids in splits.items() for name in ids):
        other, where = seen.setdefault(name.casefold(), (name, split))
        if other != name:
            detail = f"'{name}' and '{other}' (in {where}.txt) differ in case only; rename one."
            found("id-case-clash", folder / f"{split}.txt", detail)
