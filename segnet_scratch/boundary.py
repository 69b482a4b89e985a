"""Boundary F1: how well the contours of a segmentation follow those of the ground truth (SegNet paper, section 4.1).

The measure is that of Csurka, Larlus and Perronnin, "What is a good evaluation measure for semantic segmentation?"
(BMVC 2013), with SegNet's tolerance. docs/metrics.md defines it and works a small case by hand.
"""

from math import ceil, hypot

import numpy as np

from segnet_scratch.data.palette import VOID

TOLERANCE = 0.0075
"""The distance up to which contours match, as a share of the image diagonal."""


def boundary_f1(truth: np.ndarray, prediction: np.ndarray, tolerance: float = TOLERANCE) -> dict[int, float]:
    """F1 of every class that has a contour in the ground truth, by label; truth and prediction integers (h, w).

    A contour pixel of one map is matched if the other map has one of the same class at a Euclidean distance below
    `tolerance` times the image diagonal. Precision is the share of the predicted contour that is matched, recall the
    share of the true one. In void nothing can be wrong: a predicted contour pixel there counts only if it is matched.
    """
    radius = tolerance * hypot(*truth.shape)
    void = truth == VOID
    f1 = {}
    for label in np.unique(truth[~void]).tolist():
        true_contour, found_contour = contour(truth == label), contour(prediction == label)
        if not true_contour.any():
            continue  # the class fills the image
        matched = found_contour & near(true_contour, radius)
        recalled = true_contour & near(found_contour, radius)
        counted = matched | (found_contour & ~void)
        # Without a match on one side there is none on the other.
        if not matched.any():
            f1[label] = 0.0
            continue
        precision, recall = matched.sum() / counted.sum(), recalled.sum() / true_contour.sum()
        f1[label] = float(2 * precision * recall / (precision + recall))
    return f1


def contour(region: np.ndarray) -> np.ndarray:
    """The pixels of a region, bool (h, w), that have an upper, lower, left or right neighbour outside of it.

    The border of the image is no contour: every segmentation has it in the same place.
    """
    edge = np.zeros_like(region)
    edge[1:] |= ~region[:-1]
    edge[:-1] |= ~region[1:]
    edge[:, 1:] |= ~region[:, :-1]
    edge[:, :-1] |= ~region[:, 1:]
    return edge & region


def near(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Where a pixel of `pixels`, bool (h, w), lies at a Euclidean distance of less than `radius` > 0. Exact.

    A disc is dilated row by row: the row at vertical distance d reaches sqrt(radius^2 - d^2) to both sides, and running
    sums tell whether a row holds a pixel within that reach.
    """
    height, width = pixels.shape
    reach = _farthest(0, radius)
    # sums[:, k]: pixels in the first k columns, with `reach` empty columns added on both sides
    sums = np.zeros((height, width + 2 * reach + 1), np.int32)
    np.cumsum(np.pad(pixels, ((0, 0), (reach, reach))), axis=1, out=sums[:, 1:])
    reached = np.zeros_like(pixels)
    for d in range(min(reach, height - 1) + 1):
        half = _farthest(d, radius)
        last, first = reach + half + 1, reach - half
        hit = sums[:, last : last + width] > sums[:, first : first + width]
        reached[d:] |= hit[: height - d]
        reached[: height - d] |= hit[d:]
    return reached


def _farthest(d: int, radius: float) -> int:
    """The largest k with sqrt(d^2 + k^2) < radius, where d < radius."""
    k = ceil(radius)
    while hypot(d, k) >= radius:
        k -= 1
    return k
