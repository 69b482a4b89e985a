"""Boundary F1 against the case worked by hand in docs/reference/metrics.md, a brute-force implementation and SciPy."""

from math import hypot, sqrt

import numpy as np
import pytest
from support import ROOT

from segnet_scratch.boundary import TOLERANCE, authors_boundary_f1, boundary_f1
from segnet_scratch.data import VOID

TRUTH = np.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 6, np.uint8)
PREDICTION = np.array([[0, 0, 0, 0, 1, 1, 1, 1]] * 4 + [[0, 0, 0, 0, 0, 0, 0, 1]] * 2, np.uint8)
RADIUS_OF_1_5 = 0.15  # of the diagonal of 6 x 8


def brute_contour(labels, label):
    """Positions of the contour of a class, pixel by pixel."""
    height, width = labels.shape
    found = []
    for i in range(height):
        for j in range(width):
            around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
            inside = [(a, b) for a, b in around if 0 <= a < height and 0 <= b < width]
            if labels[i, j] == label and any(labels[place] != label for place in inside):
                found.append((i, j))
    return found


def brute_boundary_f1(truth, prediction, tolerance):
    """By the definition: every pair of contour pixels, one class after the other."""
    radius = tolerance * sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)
    result = {}
    for label in sorted(set(truth.reshape(-1).tolist()) - {VOID}):
        true, found = brute_contour(truth, label), brute_contour(prediction, label)
        if not true:
            continue

        def matches(place, others):
            return any(hypot(place[0] - a, place[1] - b) < radius for a, b in others)

        hits = [place for place in found if matches(place, true)]
        misses = [place for place in found if place not in hits and truth[place] != VOID]
        recalled = [place for place in true if matches(place, found)]
        if not hits:
            result[label] = 0.0
            continue
        precision, recall = len(hits) / (len(hits) + len(misses)), len(recalled) / len(true)
        result[label] = 2 * precision * recall / (precision + recall)
    return result


def blobs(rng, height, width, classes):
    """A label map of a few rectangles, some of them void."""
    labels = np.full((height, width), rng.integers(classes), np.uint8)
    for _ in range(6):
        top, left = rng.integers(height), rng.integers(width)
        label = VOID if rng.random() < 0.2 else rng.integers(classes)
        labels[top : top + rng.integers(1, 8), left : left + rng.integers(1, 8)] = label
    return labels


def test_the_case_of_the_documentation():
    f1 = boundary_f1(TRUTH, PREDICTION, RADIUS_OF_1_5)
    assert f1 == pytest.approx({0: 10 / 13, 1: 5 / 7}, rel=1e-12)
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    for figure in (
        "5/7",
        "10/13",
        "135/182",
        *(" ".join(map(str, row)) for row in (*TRUTH.tolist(), *PREDICTION.tolist())),
    ):
        assert figure in text


def largest_matching(first, second, radius):
    """Pairs, by augmenting paths, one pixel after the other."""
    partner = {}

    def augment(place, seen):
        for other in second:
            if hypot(place[0] - other[0], place[1] - other[1]) <= radius and other not in seen:
                seen.add(other)
                if other not in partner or augment(partner[other], seen):
                    partner[other] = place
                    return True
        return False

    return sum(augment(place, set()) for place in first)


def brute_authors(truth, prediction, tolerance):
    """By the description in docs/reference/metrics.md: squares of four pixels one by one, pairs by augmenting paths."""
    height, width = truth.shape
    radius = tolerance * hypot(height, width)

    def line(labels, label):
        found = []
        for i in range(height):
            for j in range(width):
                square = [labels[a, b] == label for a in (i, i + 1) for b in (j, j + 1) if a < height and b < width]
                if len(set(square)) > 1:
                    found.append((i, j))
        return found

    result = {}
    for label in sorted((set(truth.reshape(-1).tolist()) | set(prediction.reshape(-1).tolist())) - {VOID}):
        true, found = line(truth, label), line(prediction, label)
        if true or found:
            result[label] = 2 * largest_matching(found, true, radius) / (len(true) + len(found))
    return result


def test_the_case_of_the_documentation_as_the_authors_compute_it():
    pytest.importorskip("scipy")
    f1 = authors_boundary_f1(TRUTH, PREDICTION, RADIUS_OF_1_5)
    assert f1 == pytest.approx({0: 2 / 3, 1: 2 / 3}, rel=1e-12)
    assert "F1 = 2 · 5 / (6 + 9) = 2/3" in (ROOT / "docs" / "reference" / "metrics.md").read_text()


def test_small_cases_of_the_authors_measure():
    pytest.importorskip("scipy")
    left = np.array([[0, 0, 1, 1]] * 3, np.uint8)
    right = np.array([[0, 1, 1, 1]] * 3, np.uint8)
    assert authors_boundary_f1(left, left) == {0: 1, 1: 1}
    assert authors_boundary_f1(left, right) == {0: 0, 1: 0}  # one pixel off, the radius is far below one
    assert authors_boundary_f1(left, right, 0.2) == {0: 1, 1: 1}  # the diagonal is 5, and its end counts
    assert authors_boundary_f1(left, right, 0.199) == {0: 0, 1: 0}
    # Of a pixel moved by (3, 3) the radius of 400 x 400, 3 sqrt(2), reaches all four corners.
    first, second = np.zeros((2, 400, 400), np.uint8)
    first[200, 200] = second[203, 203] = 1
    assert authors_boundary_f1(first, second)[1] == 1
    # Two lines of the prediction about one of the truth: it serves one of them only.
    stripe = np.array([[0, 1, 1, 0]] * 3, np.uint8)
    assert authors_boundary_f1(left, stripe, 0.2) == {0: 2 * 3 / 9, 1: 2 * 3 / 9}
    # A class that is only predicted counts as 0, and void is a region like any other.
    third = np.where(right == 1, 2, right).astype(np.uint8)
    assert authors_boundary_f1(left, third, 0.2) == {0: 1, 1: 0, 2: 0}
    void = np.array([[0, 0, VOID, VOID]] * 3, np.uint8)
    assert authors_boundary_f1(void, np.zeros_like(void)) == {0: 0}
    assert boundary_f1(void, np.zeros_like(void)) == {0: 0}
    assert authors_boundary_f1(np.zeros((3, 4), np.uint8), np.zeros((3, 4), np.uint8)) == {}


@pytest.mark.parametrize("seed", range(6))
def test_the_authors_measure_against_brute_force(seed):
    pytest.importorskip("scipy")
    rng = np.random.default_rng(seed)
    truth, prediction = blobs(rng, 11, 13, 3), blobs(rng, 11, 13, 4)
    prediction[prediction == VOID] = 0
    for tolerance in (0.03, 0.09, 0.2):
        expected = brute_authors(truth, prediction, tolerance)
        assert authors_boundary_f1(truth, prediction, tolerance) == pytest.approx(expected, rel=1e-12)


def test_the_tolerance_is_that_of_the_paper():
    assert TOLERANCE == 0.0075
    assert (
        boundary_f1(TRUTH, PREDICTION) == boundary_f1(TRUTH, PREDICTION, 0.0075) != boundary_f1(TRUTH, PREDICTION, 0.15)
    )


@pytest.mark.parametrize("tolerance", [0.0075, 0.05, 0.1, 0.15, 0.4])
def test_against_brute_force(tolerance):
    rng = np.random.default_rng(int(1e4 * tolerance))
    partial = 0
    for _ in range(12):
        height, width = rng.integers(1, 24, 2)
        truth, prediction = blobs(rng, height, width, 4), blobs(rng, height, width, 4)
        if rng.random() < 0.5:
            prediction = np.roll(truth, rng.integers(-2, 3, 2), (0, 1))
        prediction = np.where(prediction == VOID, 0, prediction)
        expected = brute_boundary_f1(truth, prediction, tolerance)
        found = boundary_f1(truth, prediction, tolerance)
        assert found.keys() == expected.keys()
        for label, f1 in expected.items():
            assert found[label] == pytest.approx(f1, rel=1e-12, abs=0)
            partial += 0 < f1 < 1
    assert partial > 3  # else the comparison says little


def test_perfect_is_one_and_far_is_zero():
    truth = np.zeros((40, 50), np.uint8)
    truth[10:20, 10:20] = 2
    assert boundary_f1(truth, truth) == {0: 1.0, 2: 1.0}
    assert boundary_f1(truth, np.roll(truth, 18, axis=1)) == {0: 0.0, 2: 0.0}
    assert boundary_f1(truth, np.zeros_like(truth)) == {0: 0.0, 2: 0.0}  # the class was not found at all


def test_an_image_of_one_class_has_no_contour():
    truth = np.full((20, 20), 3, np.uint8)
    assert boundary_f1(truth, truth) == {}
    assert boundary_f1(np.full((20, 20), VOID, np.uint8), truth) == {}


def test_in_void_nothing_is_wrong_but_a_match_counts():
    # As VOC draws it: an object (here a stripe) between bands of void. The prediction ends in the middle of a band.
    truth, prediction = np.zeros((60, 80), np.uint8), np.zeros((60, 80), np.uint8)
    truth[15:45], truth[20:40], prediction[18:42] = VOID, 1, 1
    assert boundary_f1(truth, prediction, 0.031) == {0: 1.0, 1: 1.0}  # up to 3.1 pixels: 2 and 3
    # Another object that is predicted in a large region of void is no mistake; on background it is one.
    prediction[2:9, 10:70] = 1
    assert boundary_f1(truth, prediction, 0.031)[1] < 0.9
    truth[:12] = VOID
    assert boundary_f1(truth, prediction, 0.031)[1] == 1.0


def test_distances_below_the_radius_match_and_equal_ones_do_not():
    truth, prediction = np.zeros((240, 320), np.uint8), np.zeros((240, 320), np.uint8)
    truth[:, 100:] = 1
    for shift, f1 in ((0, 1.0), (2, 1.0), (3, 0.0)):  # 0.75 % of the diagonal of 400 is 3
        prediction[:] = np.arange(320) >= 100 + shift
        assert boundary_f1(truth, prediction) == {0: f1, 1: f1}
