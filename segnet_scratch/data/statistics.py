"""How often each class occurs, and the weights by which the paper balances the loss.

Median-frequency balancing (SegNet, section 4.1, after Eigen and Fergus 2015):

    freq(c)   = pixels of class c / pixels of the images in which c occurs
    weight(c) = median of freq over the classes / freq(c)

Void is left out of both counts: it has no part in the loss. The two counts run over the whole split before they are
divided; the mean over images of each image's share would be another number.
"""

from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np

from segnet_scratch.data.loader import Progress, parallel_map, silent
from segnet_scratch.data.palette import VOID
from segnet_scratch.data.pictures import label_counts, read_mask
from segnet_scratch.data.voc import VOCDataset
from segnet_scratch.errors import DataError, printable

# The weight of a class without a pixel: no loss is ever multiplied by it, so it only has to be harmless. With 1, the
# weight of the median class, the class counts as any other should the weights be used where it does occur; 0 would
# silently ignore it there, and the formula gives infinity.
ABSENT_WEIGHT = 1.0


@dataclass(frozen=True)
class ClassStatistics:
    """Counts over the masks of one split; arrays are int64 (classes,).

    pixels: of each class. images: masks that hold the class. reachable: pixels, void left out, of those masks.
    void: pixels that are void. masks: their number.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    images: np.ndarray
    reachable: np.ndarray
    void: int
    masks: int

    @property
    def share(self) -> np.ndarray:
        """Of each class among all pixels but void: float64 (classes,)."""
        return self.pixels / max(1, int(self.pixels.sum()))

    @property
    def frequency(self) -> np.ndarray:
        """freq(c): float64 (classes,), NaN for a class that does not occur."""
        absent = np.full(len(self.names), np.nan)
        return np.divide(self.pixels, self.reachable, out=absent, where=self.reachable > 0)

    @property
    def weights(self) -> np.ndarray:
        """Median-frequency weights: float64 (classes,), ABSENT_WEIGHT for a class that does not occur.

        The median is over the classes that occur; of an even number of them, the mean of the middle two.
        """
        frequency = self.frequency
        return np.where(np.isnan(frequency), ABSENT_WEIGHT, np.nanmedian(frequency) / frequency)

    def to_json(self) -> dict[str, Any]:
        """One row per class in `classes`, and `masks`, `void` (pixels); the frequency of an absent class is None."""
        columns = (self.pixels, self.images, self.frequency, self.weights)
        rows = zip(self.names, *(column.tolist() for column in columns), strict=True)
        return {
            "masks": self.masks,
            "void": self.void,
            "classes": [
                {"name": name, "pixels": p, "images": n, "frequency": None if isnan(f) else f, "weight": w}
                for name, p, n, f, w in rows
            ],
        }

    def to_toml(self, source: str) -> str:
        """The weights as `class_weights = [...]` for a configuration of training, one commented line a class.

        source: what the weights were counted in, for the comment at the head.
        """
        head = f"# Median-frequency weights of {printable(source)}: {self.masks} masks, void left out."
        lines = [head, "class_weights = ["]
        for name, weight, images in zip(self.names, self.weights, self.images, strict=True):
            absent = "" if images else f" (does not occur: neutral weight {ABSENT_WEIGHT:g})"
            lines.append(f"    {float(f'{weight:.6g}')!r},  # {printable(name)}{absent}")
        return "\n".join([*lines, "]", ""])


def class_statistics(dataset: VOCDataset, workers: int | None = None, progress: Progress = silent) -> ClassStatistics:
    """Counts the labels in all masks of a split; images are not opened.

    workers: threads, as many as cores unless given. progress is told of the masks done and their number. Raises
    DataError as `read_mask` does, and where all masks are void.
    """

    def count(index: int) -> np.ndarray:
        return label_counts(read_mask(dataset.mask_path(index), dataset.classes))

    counts = np.array(list(parallel_map(count, range(len(dataset)), workers, progress)))
    of_classes, void = counts[:, : dataset.classes], int(counts[:, VOID].sum())
    reachable = np.where(of_classes > 0, of_classes.sum(axis=1, keepdims=True), 0).sum(axis=0)
    if not of_classes.any():
        what = f"all {len(dataset)} masks of split '{dataset.split}' are void throughout, so there is nothing to weigh"
        raise DataError(f"{dataset.root}: {what}; mark some pixels, or use another split.")
    pixels, images = of_classes.sum(axis=0), (of_classes > 0).sum(axis=0)
    return ClassStatistics(dataset.names, pixels, images, reachable, void, len(dataset))
