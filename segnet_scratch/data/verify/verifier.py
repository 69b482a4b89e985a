"""The run over a whole data set: layout, every pair, and what only the whole shows."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from segnet_scratch.data.findings import CODES, Finding, Findings, Tell
from segnet_scratch.data.loader import Progress, parallel_map, silent
from segnet_scratch.data.palette import VOID
from segnet_scratch.data.suspicions import suspect, suspect_palette
from segnet_scratch.data.verify.layout import examine_layout, purpose
from segnet_scratch.data.verify.pair import Folders, PairFacts, examine_pair
from segnet_scratch.data.voc import IMAGE_FOLDER, IMAGE_SUFFIXES, MASK_FOLDER, find_image, mask_file


@dataclass(frozen=True)
class Report:
    """The facts about a data set and what is wrong with it.

    splits: number of ids by split. pairs: number of ids looked at, each once. sizes: number of images by
    (height, width). image_modes, mask_modes: number of files by Pillow's mode. unlisted: images and masks that no
    split names. pixels: int64 (256,), pixels by label over all masks; images: int64 (256,), masks that hold a label.
    findings: errors first, then by code, then by file.
    """

    root: Path
    names: tuple[str, ...]
    splits: dict[str, int]
    pairs: int
    sizes: Counter[tuple[int, int]]
    image_modes: Counter[str]
    mask_modes: Counter[str]
    unlisted: dict[str, int]
    pixels: np.ndarray
    images: np.ndarray
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing but warnings was found."""
        return not any(finding.is_error for finding in self.findings)

    @property
    def void_share(self) -> float:
        """The fraction of all pixels that are void; 0 where no mask could be read."""
        return float(self.pixels[VOID] / max(1, self.pixels.sum()))

    def by_code(self) -> dict[str, list[Finding]]:
        """The findings of each code that occurs, in their order."""
        return {code: list(group) for code, group in groupby(self.findings, lambda finding: finding.code)}

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object; sizes as "HEIGHTxWIDTH", pixels and images by class name and "void"."""
        labels = {**dict(enumerate(self.names)), VOID: "void"}
        return {
            **{key: value for key, value in vars(self).items() if key != "names"},
            "root": str(self.root),
            "passed": self.passed,
            "sizes": {f"{height}x{width}": count for (height, width), count in self.sizes.most_common()},
            "pixels": {name: int(self.pixels[label]) for label, name in labels.items()},
            "images": {name: int(self.images[label]) for label, name in labels.items()},
            "void_share": self.void_share,
            "findings": [
                {"code": f.code, "error": f.is_error, "meaning": CODES[f.code], "file": str(f.path), "detail": f.detail}
                for f in self.findings
            ],
        }


def verify(
    path: str | Path, splits: Sequence[str] = (), workers: int | None = None, progress: Progress = silent
) -> Report:
    """Reads every image, mask and annotation that a split names, and reports all that is wrong.

    path: as for VOCDataset. splits: those to look at, or all. workers: threads, as many as cores unless given.
    progress is told of the ids done and their number.
    What passes, VOCDataset reads. Raises DataError where there is nothing like a data set, or no such split.
    """
    found = Findings()
    root, names, lists = examine_layout(Path(path), splits, found)
    ids = list(dict.fromkeys(chain(*lists.values())))
    folders = Folders(root)
    facts = list(parallel_map(partial(examine_pair, folders, names), ids, workers, progress))
    found += chain(*(pair.found for pair in facts))
    _examine_twins(root, lists, facts, found)
    _examine_palettes(root, facts, found)
    doubts, by_name = Findings(), {pair.name: pair for pair in facts}
    for split, members in lists.items():
        histograms = _histograms(by_name[name] for name in members)
        if purpose(split) == "train" and len(histograms):
            suspect(root, split, names, histograms.sum(axis=0), f"the {len(histograms):,} masks", doubts)
    found += dict.fromkeys(doubts)  # two lists may give the same
    histograms = _histograms(facts)
    return Report(
        root=root,
        names=names,
        splits={split: len(members) for split, members in lists.items()},
        pairs=len(ids),
        sizes=Counter(filter(None, (pair.image_size for pair in facts))),
        image_modes=Counter(filter(None, (pair.image_mode for pair in facts))),
        mask_modes=Counter(filter(None, (pair.mask_mode for pair in facts))),
        unlisted={
            IMAGE_FOLDER: _unlisted(folders.images.values(), set(ids), IMAGE_SUFFIXES),
            MASK_FOLDER: _unlisted(folders.masks.values(), set(ids), (".png",)),
        },
        pixels=histograms.sum(axis=0),
        images=(histograms > 0).sum(axis=0),
        findings=tuple(sorted(found, key=lambda finding: (not finding.is_error, finding.code, str(finding.path)))),
    )


def _histograms(facts: Iterable[PairFacts]) -> np.ndarray:
    """The pixels of each label in each mask that could be read: int64 (masks, 256)."""
    return np.array([pair.labels for pair in facts if pair.labels is not None], np.int64).reshape(-1, 256)


def _examine_twins(root: Path, lists: dict[str, list[str]], facts: list[PairFacts], found: Tell) -> None:
    """Tells of ids whose image files hold the same bytes; across a training and a scoring split that is a leak."""
    purposes, first = defaultdict(set), dict[bytes, str]()
    for split, members in lists.items():
        for name in members:
            purposes[name].add(purpose(split))
    for pair in facts:
        other = first.setdefault(pair.digest, pair.name) if pair.digest else pair.name
        if other != pair.name:
            code = "image-leak" if {"train", "score"} <= purposes[pair.name] | purposes[other] else "same-image"
            detail = f"holds the same bytes as the image of '{other}'; take one of the two ids out of the lists."
            found(code, find_image(root, pair.name), detail)


def _examine_palettes(root: Path, facts: list[PairFacts], found: Tell) -> None:
    """Tells once where masks give one label several colours: each may have been numbered anew, on its own.

    Only colours of labels that a mask holds count, since programs cut or fill the rest of the palette as they like.
    """
    used = {pair.name: pair.colours for pair in facts if pair.colours}
    counts: dict[int, Counter[bytes]] = defaultdict(Counter)
    for label, colour in chain(*(colours.items() for colours in used.values())):
        counts[label][colour] += 1
    usual = {label: counter.most_common(1)[0][0] for label, counter in counts.items()}
    odd = [name for name, colours in used.items() if not colours.items() <= usual.items()]
    if odd:
        detail = f"{len(odd)} of {len(used)} masks, this one the first, give a label another colour than most do"
        fix = "do their numbers mean the same? Look at them with segnet data show."
        found("palettes-differ", mask_file(root, odd[0]), f"{detail}; {fix}")
    suspect_palette(root, dict(chain(*(colours.items() for colours in used.values()))), found)


def _unlisted(files: Iterable[str], ids: set[str], suffixes: tuple[str, ...]) -> int:
    return sum(path.suffix in suffixes and path.stem not in ids for path in map(PurePath, files))
