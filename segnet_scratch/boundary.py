"""Boundary F1: how well the contours of a segmentation follow those of the ground truth (SegNet paper, section 4.1).

The measure is that of Csurka, Larlus and Perronnin, "What is a good evaluation measure for semantic segmentation?"
(BMVC 2013), with SegNet's tolerance; and what the script of SegNet's authors makes of it, for a comparison with their
figures. docs/reference/metrics.md defines both and works a small case by hand.
"""

from enum import StrEnum
from math import ceil, hypot

import numpy as np

from segnet_scratch.data.palette import VOID
from segnet_scratch.errors import require


class Boundary(StrEnum):
    """csurka: the measure as its paper has it. authors: as SegNet's authors computed their figures."""

    csurka = "csurka"
    authors = "authors"


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
        f1[label] = 0.0
        if matched.any():  # without a match on one side there is none on the other
            precision, recall = matched.sum() / counted.sum(), recalled.sum() / true_contour.sum()
            f1[label] = float(2 * precision * recall / (precision + recall))
    return f1


def authors_boundary_f1(truth: np.ndarray, prediction: np.ndarray, tolerance: float = TOLERANCE) -> dict[int, float]:
    """F1 by label, of every class with a contour in either map, as in the authors' computeBFmeasure.m.

    Contour pixels are matched one to one, as many as can be within the tolerance, its end included (Berkeley's
    correspondPixels): with m pairs F1 = 2 m / (pixels of both contours). A class that is only predicted, or never,
    scores 0. Void is one more region, and its border a contour like any other. Needs SciPy.
    """
    radius = tolerance * hypot(*truth.shape)
    f1 = {}
    for label in sorted({*np.unique(truth).tolist(), *np.unique(prediction).tolist()} - {VOID}):
        true, found = (corners(labels == label) for labels in (truth, prediction))
        if pixels := int(true.sum() + found.sum()):
            f1[label] = 2 * _pairs(true, found, radius) / pixels
    return f1


def corners(region: np.ndarray) -> np.ndarray:
    """Where a region, bool (h, w), and its outside meet below or to the right: bool (h, w).

    A pixel counts if the pixels below, to the right and below to the right of it are not all on its side: a contour of
    one pixel's width, the same for a region and its outside (Berkeley's seg2bdry).
    """
    edge = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    here, below, right, across = edge[:-1, :-1], edge[1:, :-1], edge[:-1, 1:], edge[1:, 1:]
    return (here != below) | (here != right) | (here != across)


def _pairs(first: np.ndarray, second: np.ndarray, radius: float) -> int:
    """How many pixels of two maps, bool (h, w), can be matched one to one at distances of at most `radius`."""
    purpose = "boundary F1 of the authors"
    tree = require("scipy.spatial", "boundary", purpose).KDTree
    matching = require("scipy.sparse.csgraph", "boundary", purpose).maximum_bipartite_matching
    if not (first.any() and second.any()):
        return 0
    # The tree compares squares, whose roundings are not those of distances: (3, 3) is within a radius of 3 sqrt(2).
    radius = float(np.nextafter(radius, np.inf))
    near = tree(np.argwhere(first)).sparse_distance_matrix(tree(np.argwhere(second)), radius, output_type="coo_matrix")
    near.data[:] = 1  # a distance of 0 is one, too
    return int(np.count_nonzero(matching(near.tocsr(), perm_type="column") >= 0))


def contour(region: np.ndarray) -> np.ndarray:
    """The pixels of a region, bool (h, w), that have an upper, lower, left or right neighbour outside of it.

    The border of the image is no contour: every segmentation has it in the same place.
    """
    padded = np.pad(region, 1, mode="edge")
    return region & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


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
