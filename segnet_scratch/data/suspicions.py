"""What the labels of all masks together give reason to doubt: mistakes that train without an error and teach little."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from segnet_scratch.data.colours import VOID_NAMES
from segnet_scratch.data.findings import Finding
from segnet_scratch.data.loader import ordered_map
from segnet_scratch.data.palette import VOID, is_voc
from segnet_scratch.data.pictures import convert_command, decode, label_counts, mask_labels, palette_of
from segnet_scratch.data.voc import SPLIT_FOLDER, VOCDataset
from segnet_scratch.errors import DataError


def suspicions(root: Path, split: str, names: Sequence[str], pixels: np.ndarray, masks: str) -> list[Finding]:
    """What is odd about the labels of a training list.

    pixels: int64 (256,), those of each label. masks: what they were counted in, for the messages.
    """
    lines, found = root / SPLIT_FOLDER / f"{split}.txt", []
    seen = np.flatnonzero(pixels[:VOID])
    count = len(names)
    for name in names:
        if name.lower() in VOID_NAMES:
            detail = f"'{name}' is trained, and counts in every score; if it is to count for nothing: "
            found.append(Finding("void-as-class", root / "labels.txt", detail + convert_command(root, f"{name}=void")))
    if seen.tolist() == [0] and pixels[VOID] and count > 1:
        detail = (
            f"{masks} hold only 0 ({names[0]}) and 255, which is void and never learnt; if 255 is to be {names[1]}: "
        )
        found.append(Finding("labels-0-and-255", lines, detail + convert_command(root, "255=1")))
    elif len(seen) > 1 and seen.tolist() == list(range(1, len(seen) + 1)):
        shift = ",".join(f"{label}={label - 1}" for label in range(1, count + 1))
        detail = f"{masks} hold {seen[0]} to {seen[-1]} and no 0 ({names[0]}); if numbers begin at 1: "
        found.append(Finding("labels-from-1", lines, detail + convert_command(root, shift)))
    absent = [name for label, name in enumerate(names) if not pixels[label]]
    if absent and seen.size:
        detail = f"{masks} have no pixel of {', '.join(absent)}; a network cannot learn what it never sees."
        found.append(Finding("class-absent", lines, detail))
    return found


def odd_palette(root: Path, colours: dict[int, bytes]) -> list[Finding]:
    """A suspicion where classes are VOC's for want of a labels.txt, and the masks have colours that are not VOC's.

    colours: those that masks give the labels they hold.
    """
    labels = [label for label in colours if len(colours[label]) == 3]
    table = np.zeros((256, 3), np.uint8)
    for label in labels:
        table[label] = list(colours[label])
    grey = (table == table[:, :1]).all()
    if (root / "labels.txt").exists() or grey or is_voc(table, labels):
        return []
    detail = "there is none, so that classes are VOC's 21; yet colours in the masks are not VOC's: name their classes."
    return [Finding("palette-not-voc", root / "labels.txt", detail)]


def look_over(dataset: VOCDataset, workers: int = 2, at_most: int = 2000) -> list[Finding]:
    """The suspicions about a training split that some of its masks raise, in no time where there are none.

    Masks are read in a shuffled order until every class was seen, at most so many. Those that cannot be read are
    passed over: whoever needs them is told.
    """
    order = np.random.default_rng(0).permutation(len(dataset))[:at_most]
    pixels, masks = np.zeros(256, np.int64), 0
    colours: dict[int, bytes] = {}

    def examine(index: int) -> tuple[np.ndarray, bytes | None] | None:
        path = dataset.mask_path(index)
        try:
            picture = decode(path, "mask")
            return label_counts(mask_labels(path, picture)), palette_of(picture)
        except DataError:
            return None

    with closing(ordered_map(examine, order.tolist(), workers, ahead=4 * max(1, workers))) as results:
        for counts, palette in filter(None, results):
            pixels += counts
            masks += 1
            for label in np.flatnonzero(counts[:VOID]).tolist():
                colours.setdefault(label, (palette or b"")[3 * label : 3 * label + 3])
            if pixels[: dataset.classes].all():
                break
    of = "the" if masks == len(dataset) else f"{masks:,} of the"
    found = suspicions(dataset.root, dataset.split, dataset.names, pixels, f"{of} {len(dataset):,} masks")
    return [*found, *odd_palette(dataset.root, colours)]
