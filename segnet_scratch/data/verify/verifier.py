"""The run over a whole data set: layout, every pair, and what only the whole shows."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path, PurePath

import numpy as np

from segnet_scratch.data.findings import Findings, Tell
from segnet_scratch.data.suspicions import suspect, suspect_palette
from segnet_scratch.data.verify.layout import Layout, examine_layout, purpose
from segnet_scratch.data.verify.pair import Folders, PairFacts, examine_pair
from segnet_scratch.data.verify.report import Report
from segnet_scratch.data.voc import IMAGE_FOLDER, IMAGE_SUFFIXES, MASK_FOLDER, find_image, mask_file
from segnet_scratch.data.walk import Progress, silent, walk


def verify(
    path: str | Path, splits: Sequence[str] = (), workers: int | None = None, progress: Progress = silent
) -> Report:
    """Reads every image, mask and annotation that a split names, and reports all that is wrong.

    path: as for VOCDataset. splits: those to look at, or all. workers: threads, as many as cores unless given.
    progress is told of the ids done and their number.
    What passes, VOCDataset reads. Raises DataError where there is nothing like a data set, or no such split.
    """
    found = Findings()
    layout = examine_layout(Path(path), splits, found)
    ids = list(dict.fromkeys(chain(*layout.splits.values())))
    folders = Folders(layout.root)
    facts = list(walk(partial(examine_pair, folders, layout.names), ids, workers, progress))
    found += chain(*(pair.found for pair in facts))
    _examine_twins(layout, facts, found)
    _examine_palettes(layout, facts, found)
    _examine_labels(layout, facts, found)
    histograms = _histograms(facts)
    return Report(
        root=layout.root,
        names=layout.names,
        splits={split: len(members) for split, members in layout.splits.items()},
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


def _examine_twins(layout: Layout, facts: list[PairFacts], found: Tell) -> None:
    """Tells of ids whose image files hold the same bytes; across a training and a scoring split that is a leak."""
    purposes, first = defaultdict(set), dict[bytes, str]()
    for split, members in layout.splits.items():
        for name in members:
            purposes[name].add(purpose(split))
    for pair in facts:
        other = first.setdefault(pair.digest, pair.name) if pair.digest else pair.name
        if other != pair.name:
            code = "image-leak" if {"train", "score"} <= purposes[pair.name] | purposes[other] else "same-image"
            detail = f"holds the same bytes as the image of '{other}'; take one of the two ids out of the lists."
            found(code, find_image(layout.root, pair.name), detail)


def _examine_palettes(layout: Layout, facts: list[PairFacts], found: Tell) -> None:
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
        found("palettes-differ", mask_file(layout.root, odd[0]), f"{detail}; {fix}")
    suspect_palette(layout.root, dict(chain(*(colours.items() for colours in used.values()))), found)


def _examine_labels(layout: Layout, facts: list[PairFacts], found: Findings) -> None:
    """Tells what the labels of each training list give reason to doubt; what two lists give, once."""
    doubts, by_name = Findings(), {pair.name: pair for pair in facts}
    for split, members in layout.splits.items():
        histograms = _histograms(by_name[name] for name in members)
        if purpose(split) == "train" and len(histograms):
            masks = f"the {len(histograms):,} masks"
            suspect(layout.root, split, layout.names, histograms.sum(axis=0), masks, doubts)
    found += dict.fromkeys(doubts)


def _unlisted(files: Iterable[str], ids: set[str], suffixes: tuple[str, ...]) -> int:
    return sum(path.suffix in suffixes and path.stem not in ids for path in map(PurePath, files))
