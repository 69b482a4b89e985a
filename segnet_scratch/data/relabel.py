"""New numbers for the labels of masks: what `segnet data convert --relabel` is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from segnet_scratch.data.palette import VOID, class_palette
from segnet_scratch.data.pictures import decode, label_counts, mask_labels
from segnet_scratch.errors import ConfigError


@dataclass(frozen=True)
class Relabelling:
    """names: of the classes afterwards. kept: their old numbers. lookup: uint8 (256,), the new number of each old one.

    known: bool (256,), whether an old number means anything at all.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]
    lookup: np.ndarray
    known: np.ndarray
    # What masks may hold that it does not tell, and what to do then.
    lacks: ClassVar = (
        "numbers that are no class",
        "Say what each means, for example --relabel 7=void, or name its class in labels.txt.",
    )

    def palette(self, old: np.ndarray | None = None) -> np.ndarray:
        """The colour of every label, uint8 (256, 3): that of its old number, as far as these are known."""
        return class_palette(self.names, None if old is None else old[list(self.kept)].tolist())

    def labels_of(self, path: Path) -> np.ndarray | str:
        """The new labels of a mask, uint8 (H, W); or what is said of numbers that mean nothing."""
        labels = mask_labels(path, decode(path, "mask"))
        if wrong := np.flatnonzero(label_counts(labels) * ~self.known).tolist():
            return f"{path}: {', '.join(map(str, wrong))}"
        return self.lookup[labels]


def parse_relabelling(text: str, names: Sequence[str]) -> Relabelling:
    """What `OLD=NEW,...` makes of the classes `names`.

    OLD is a number or a class, NEW a number, a class or void; what is not mentioned stays. A class that is given
    another number, and whose own nothing takes, is a class no more: the numbers above it move down. Raises ConfigError
    for anything else.
    """
    lookup, known = np.arange(256), np.zeros(256, bool)
    known[: len(names)] = known[VOID] = True
    given = {}
    for part in text.split(","):
        old, equals, new = (word.strip() for word in part.partition("="))
        source, target = _number(old, names), _number(new, names)
        if not equals or source is None or target is None or not (target < len(names) or target == VOID):
            expected = f"a number of 0..255 or a class, to the right a number below {len(names)}, a class, or void"
            example = f"for example 255=1 or {names[-1]}=void"
            raise ConfigError(f"--relabel {part.strip()}: expected OLD=NEW, to the left {expected}; {example}")
        if source in given:
            raise ConfigError(f"--relabel {text}: {old} is given twice")
        given[source] = lookup[source] = target
        known[source] = True
    kept = tuple(label for label in range(len(names)) if given.get(label, label) == label or label in given.values())
    if not kept:
        raise ConfigError(f"--relabel {text}: no class is left")
    places = np.full(256, VOID)
    places[list(kept)] = np.arange(len(kept))
    return Relabelling(tuple(names[label] for label in kept), kept, places[lookup].astype(np.uint8), known)


def _number(word: str, names: Sequence[str]) -> int | None:
    if word in names:
        return list(names).index(word)
    if word.lower() == "void":
        return VOID
    return int(word) if word.isascii() and word.isdigit() and int(word) <= VOID else None
