"""What the labels of all masks together give reason to doubt: mistakes that train without an error and teach little."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segnet_scratch.data.colours import VOID_NAMES
from segnet_scratch.data.findings import Findings, Tell
from segnet_scratch.data.loader import parallel_map
from segnet_scratch.data.palette import VOID, says_nothing
from segnet_scratch.data.pictures import convert_command, decode, label_facts, mask_labels
from segnet_scratch.data.voc import SPLIT_FOLDER, VOCDataset
from segnet_scratch.errors import DataError


def suspect(root: Path, split: str, names: Sequence[str], pixels: np.ndarray, masks: str, found: Tell) -> None:
    """Tells what is odd about the labels of a training list.

    pixels: int64 (256,), those of each label. masks: what they were counted in, for the messages.
    """
    lines = root / SPLIT_FOLDER / f"{split}.txt"
    seen = np.flatnonzero(pixels[:VOID]).tolist()
    for name in names:
        if name.lower() in VOID_NAMES:
            detail = f"'{name}' is trained, and counts in every score; if it is to count for nothing: "
            found("void-as-class", root / "labels.txt", detail + convert_command(root, f"{name}=void"))
    if seen == [0] and pixels[VOID] and len(names) > 1:
        detail = f"{masks} hold only 0 ({names[0]}) and 255, which is void and never learnt; if 255 is to be {names[1]}"
        found("labels-0-and-255", lines, f"{detail}: {convert_command(root, '255=1')}")
    elif len(seen) > 1 and seen == list(range(1, len(seen) + 1)):
        shift = ",".join(f"{label}={label - 1}" for label in range(1, len(names) + 1))
        detail = f"{masks} hold {seen[0]} to {seen[-1]} and no 0 ({names[0]}); if numbers begin at 1: "
        found("labels-from-1", lines, detail + convert_command(root, shift))
    absent = [name for label, name in enumerate(names) if not pixels[label]]
    if absent and seen:
        what = f"{masks} have no pixel of {', '.join(absent)}"
        found("class-absent", lines, f"{what}; a network cannot learn what it never sees.")


def suspect_palette(root: Path, colours: dict[int, bytes], found: Tell) -> None:
    """Tells where classes are VOC's for want of a labels.txt, and the masks have colours that are not VOC's.

    colours: those that masks give the labels they hold.
    """
    table = np.frombuffer(b"".join(colours.values()), np.uint8).reshape(-1, 3)
    path = root / "labels.txt"
    if not path.exists() and not says_nothing(table, list(colours)):
        detail = "classes are VOC's 21 for want of it; yet colours in the masks are not VOC's: name their classes."
        found("palette-not-voc", path, detail)


def look_over(dataset: VOCDataset, workers: int = 2, at_most: int = 2000) -> Findings:
    """The suspicions about a training split that some of its masks raise, in no time where there are none.

    Masks are read in a shuffled order until every class was seen, at most so many. Those that cannot be read are
    passed over: whoever needs them is told.
    """
    order = np.random.default_rng(0).permutation(len(dataset))[:at_most]
    pixels, masks = np.zeros(256, np.int64), 0
    colours: dict[int, bytes] = {}

    def examine(index: int) -> tuple[np.ndarray, dict[int, bytes]] | None:
        path = dataset.mask_path(index)
        try:
            picture = decode(path, "mask")
            return label_facts(mask_labels(path, picture), picture)
        except DataError:
            return None

    for counts, seen in filter(None, parallel_map(examine, order.tolist(), workers)):
        pixels += counts
        masks += 1
        colours = seen | colours
        if pixels[: dataset.classes].all():
            break
    of = "the" if masks == len(dataset) else f"{masks:,} of the"
    found = Findings()
    suspect(dataset.root, dataset.split, dataset.names, pixels, f"{of} {len(dataset):,} masks", found)
    suspect_palette(dataset.root, colours, found)
    return found
