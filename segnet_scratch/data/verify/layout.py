"""What a data set is made of, before any picture is opened: root, class names, lists of ids and how they overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from segnet_scratch.data.findings import Finding
from segnet_scratch.data.lists import is_plain_name, parse_labels, parse_split
from segnet_scratch.data.voc import FOLDERS, SPLIT_FOLDER, find_root, possible_roots, split_files
from segnet_scratch.errors import DataError

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Layout:
    """The root, the class names by label, the ids of each split, and what is wrong with them."""

    root: Path
    names: tuple[str, ...]
    splits: dict[str, list[str]]
    findings: list[Finding]


def examine_layout(path: Path, wanted: Sequence[str] = ()) -> Layout:
    """The layout of the data set that `path` means; of the splits `wanted`, or of all there are.

    Raises DataError where nothing there resembles a data set, and for a wanted split that does not exist.
    """
    root, findings = _root(path)
    names, _, label_findings = parse_labels(root)
    findings += label_findings
    folder = root / SPLIT_FOLDER
    files = split_files(root)
    for split in wanted:
        if split not in files:
            raise DataError(f"{folder / split}.txt: there is no split '{split}'; there are: {', '.join(files) or '-'}.")
    splits = {}
    for split in wanted or files:
        if not is_plain_name(split):
            findings.append(Finding("split-name", files[split], "rename the list, without blanks or special marks."))
        splits[split], problems = parse_split(files[split])
        findings += problems
    if not splits and folder.is_dir():
        findings.append(Finding("no-splits", folder, "expected lists such as train.txt and val.txt, got none."))
    findings += _overlaps(folder, splits) + _case_clashes(folder, splits)
    return Layout(root, names, splits, findings)


def purpose(split: str) -> str | None:
    """What a split is for by VOC's names: "train", or "score" (val..., test...); None for others.

    trainval is both by definition, so that it overlaps with neither.
    """
    if split.startswith("train") and not split.startswith("trainval"):
        return "train"
    return "score" if split.startswith(("val", "test")) else None


def _root(path: Path) -> tuple[Path, list[Finding]]:
    try:
        return find_root(path), []
    except DataError:
        # Something incomplete is still examined; only where nothing is like a data set there is nothing to examine.
        found = {root: [name for name in FOLDERS if (root / name).is_dir()] for root in possible_roots(path)}
        root = max(found, key=lambda candidate: len(found[candidate]))
        if not found[root]:
            raise
        missing = [folder for folder in FOLDERS if folder not in found[root]]
        return root, [Finding("missing-folder", root / folder, "no such folder.") for folder in missing]


def _overlaps(folder: Path, splits: dict[str, list[str]]) -> list[Finding]:
    findings = []
    for first, second in combinations(splits, 2):
        if {purpose(first), purpose(second)} != {"train", "score"}:
            continue
        train, score = sorted((first, second), key=lambda split: purpose(split) == "score")
        shared = sorted(set(splits[train]) & set(splits[score]))
        if shared:
            named = ", ".join(shared[:_NAMED_AT_MOST]) + (", ..." if len(shared) > _NAMED_AT_MOST else "")
            detail = (
                f"{len(shared)} of its {len(splits[train])} ids stand in {score}.txt too ({named}); "
                "a network is not to be scored on what it was trained on: take them out of one."
            )
            findings.append(Finding("split-overlap", folder / f"{train}.txt", detail))
    return findings


def _case_clashes(folder: Path, splits: dict[str, list[str]]) -> list[Finding]:
    seen: dict[str, tuple[str, str]] = {}
    findings = []
    for split, ids in splits.items():
        for name in ids:
            other, where = seen.setdefault(name.casefold(), (name, split))
            if other != name:
                detail = f"'{name}' and '{other}' (in {where}.txt) differ in case only; rename one."
                findings.append(Finding("id-case-clash", folder / f"{split}.txt", detail))
    return findings
