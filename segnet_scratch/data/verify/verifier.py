"""The run over a whole data set: layout, every pair, and what only the whole shows."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePath

import numpy as np

from segnet_scratch.data.findings import Finding
from segnet_scratch.data.loader import ordered_map
from segnet_scratch.data.palette import VOID
from segnet_scratch.data.suspicions import odd_palette, suspicions
from segnet_scratch.data.verify.layout import Layout, examine_layout, purpose
from segnet_scratch.data.verify.pair import Folders, PairFacts, examine_pair
from segnet_scratch.data.verify.report import Report
from segnet_scratch.data.voc import IMAGE_FOLDER, IMAGE_SUFFIXES, MASK_FOLDER, find_image, mask_file


def verify(
    path: str | Path,
    splits: Sequence[str] = (),
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Reads every image, mask and annotation that a split names, and reports all that is wrong.

    path: as for VOCDataset. splits: those to look at, or all. workers: threads, as many as cores unless given; decoding
    releases Python's lock. progress is told of the ids done and their number.
    What passes, VOCDataset reads. Raises DataError where there is nothing like a data set, or no such split.
    """
    layout = examine_layout(Path(path), splits)
    ids = list(dict.fromkeys(name for members in layout.splits.values() for name in members))
    folders = Folders(layout.root)
    workers = workers if workers is not None else os.cpu_count() or 1
    facts: dict[str, PairFacts] = {}
    examine = partial(examine_pair, folders, layout.names)
    with closing(ordered_map(examine, ids, workers, ahead=4 * workers)) as results:
        for pair in results:
            facts[pair.name] = pair
            progress(len(facts), len(ids))
    findings = [*layout.findings, *(finding for pair in facts.values() for finding in pair.findings)]
    findings += _same_images(layout, facts) + _odd_palettes(layout, facts) + _doubts(layout, facts)
    histograms = [pair.labels for pair in facts.values() if pair.labels is not None]
    return Report(
        root=layout.root,
        names=layout.names,
        splits={split: len(members) for split, members in layout.splits.items()},
        pairs=len(ids),
        sizes=Counter(pair.image_size for pair in facts.values() if pair.image_size is not None),
        image_modes=Counter(pair.image_mode for pair in facts.values() if pair.image_mode is not None),
        mask_modes=Counter(pair.mask_mode for pair in facts.values() if pair.mask_mode is not None),
        unlisted={
            IMAGE_FOLDER: _unlisted(folders.images.values(), set(ids), IMAGE_SUFFIXES),
            MASK_FOLDER: _unlisted(folders.masks.values(), set(ids), (".png",)),
        },
        pixels=np.sum(histograms, axis=0) if histograms else np.zeros(256, np.int64),
        images=np.sum([counts > 0 for counts in histograms], axis=0) if histograms else np.zeros(256, np.int64),
        findings=tuple(sorted(findings, key=lambda found: (not found.is_error, found.code, str(found.path)))),
    )


def _same_images(layout: Layout, facts: dict[str, PairFacts]) -> list[Finding]:
    """Ids whose image files hold the same bytes; across a training and a scoring split that is a leak."""
    purposes: dict[str, set[str | None]] = {}
    for split, members in layout.splits.items():
        for name in members:
            purposes.setdefault(name, set()).add(purpose(split))
    first: dict[bytes, str] = {}
    findings = []
    for pair in facts.values():
        if pair.digest is None:
            continue
        other = first.setdefault(pair.digest, pair.name)
        if other != pair.name:
            leak = {"train", "score"} <= purposes[pair.name] | purposes[other]
            path = find_image(layout.root, pair.name)
            detail = f"holds the same bytes as the image of '{other}'; take one of the two ids out of the lists."
            findings.append(Finding("image-leak" if leak else "same-image", path, detail))
    return findings


def _odd_palettes(layout: Layout, facts: dict[str, PairFacts]) -> list[Finding]:
    """One finding where masks give one label several colours: each may have been numbered anew, on its own.

    Only colours of labels that a mask holds count, since programs cut or fill the rest of the palette as they like.
    """
    used = {pair.name: _colours_in_use(pair) for pair in facts.values() if pair.palette is not None}
    counts: dict[int, Counter[bytes]] = {}
    for colours in used.values():
        for label, colour in colours.items():
            counts.setdefault(label, Counter())[colour] += 1
    usual = {label: counter.most_common(1)[0][0] for label, counter in counts.items()}
    odd = [name for name, colours in used.items() if any(usual[label] != colour for label, colour in colours.items())]
    if not odd:
        return []
    detail = (
        f"{len(odd)} of {len(used)} masks, this one the first, give a label another colour than most do; "
        "do their numbers mean the same? Look at them with segnet data show."
    )
    return [Finding("palettes-differ", mask_file(layout.root, odd[0]), detail)]


def _colours_in_use(pair: PairFacts) -> dict[int, bytes]:
    """The palette's colour of each label in a mask; void is left out, it has no colour that all agree on."""
    if pair.labels is None or pair.palette is None:
        return {}
    labels = (int(label) for label in np.flatnonzero(pair.labels) if label != VOID)
    return {label: pair.palette[3 * label : 3 * label + 3] for label in labels}


def _doubts(layout: Layout, facts: dict[str, PairFacts]) -> list[Finding]:
    """What the labels of each training list give reason to doubt, and the colours of all masks."""
    findings: dict[Finding, None] = {}  # two lists may give the same
    for split, members in layout.splits.items():
        histograms = [counts for name in members if (counts := facts[name].labels) is not None]
        if purpose(split) == "train" and histograms:
            pixels = np.sum(histograms, axis=0)
            masks = f"the {len(histograms):,} masks"
            findings |= dict.fromkeys(suspicions(layout.root, split, layout.names, pixels, masks))
    colours = {label: colour for pair in facts.values() for label, colour in _colours_in_use(pair).items()}
    return [*findings, *odd_palette(layout.root, colours)]


def _unlisted(files: Iterable[str], ids: set[str], suffixes: tuple[str, ...]) -> int:
    return sum(path.suffix in suffixes and path.stem not in ids for path in map(PurePath, files))
