"""Class frequencies and median-frequency weights: by hand, against another implementation, on real data, as TOML."""

import json
import statistics as standard_library
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from support import real
from support.data import empty_voc

from segnet_scratch import data
from segnet_scratch.config import load_config
from segnet_scratch.data import VOID, VOCDataset, statistics
from segnet_scratch.data.statistics import class_statistics
from segnet_scratch.errors import DataError


def write_masks(root, masks, names=("sky", "road", "tree", "[never] seen")):
    """A set with these masks, the images of which are no pictures at all: they are not to be opened."""
    empty_voc(root)
    for number, mask in enumerate(masks):
        (root / f"JPEGImages/m{number}.jpg").write_bytes(b"")
        data.save_indexed_png(root / f"SegmentationClass/m{number}.png", np.array(mask))
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"m{number}\n" for number in range(len(masks))))
    (root / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    return root


# Class 0: 6 pixels, in both masks, which have 4 + 6 pixels that are not void. Class 1: 3, in both. Class 2: 1, in the
# second only. Frequencies 6/10, 3/10, 1/6; their median is 3/10.
BY_HAND = [[[0, 0, 0], [1, VOID, VOID]], [[0, 0, 0], [1, 1, 2]]]


def test_a_case_by_hand(tmp_path):
    counted = class_statistics(VOCDataset(write_masks(tmp_path / "set", BY_HAND), "train"))
    assert counted.pixels.tolist() == [6, 3, 1, 0]
    assert counted.images.tolist() == [2, 2, 1, 0]
    assert counted.reachable.tolist() == [10, 10, 6, 0]
    assert (counted.void, counted.masks) == (2, 2)
    np.testing.assert_allclose(counted.frequency, [6 / 10, 3 / 10, 1 / 6, np.nan], rtol=1e-15)
    np.testing.assert_allclose(counted.weights, [1 / 2, 1, 9 / 5, 1], rtol=1e-15)
    np.testing.assert_allclose(counted.share, [0.6, 0.3, 0.1, 0], rtol=1e-15)


def by_the_paper(paths, classes: int) -> list[Fraction | None]:
    """The paper's definition in exact fractions, pixel by pixel, one class after the other."""
    masks = [list(Image.open(path).tobytes()) for path in paths]
    frequency = []
    for label in range(classes):
        holding = [mask for mask in masks if label in mask]
        pixels = sum(mask.count(label) for mask in holding)
        total = sum(len(mask) - mask.count(VOID) for mask in holding)
        frequency.append(Fraction(pixels, total) if total else None)
    middle = standard_library.median([value for value in frequency if value is not None])
    return [None if value is None else middle / value for value in frequency]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("workers", [0, 2])
def test_another_implementation_agrees(tmp_path, seed, workers):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 9))
    masks = []
    for _ in range(7):
        present = rng.permutation(classes)[: rng.integers(1, classes + 1)]
        size = tuple(rng.integers(1, 12, 2))
        masks.append(np.where(rng.random(size) < 0.2, VOID, rng.choice(present, size)))
    root = write_masks(tmp_path / "set", masks, [f"c{n}" for n in range(classes)])
    dataset = VOCDataset(root, "train")
    expected = by_the_paper([dataset.mask_path(index) for index in range(7)], classes)
    weights = class_statistics(dataset, workers).weights
    for label, weight in enumerate(expected):
        assert weights[label] == pytest.approx(1.0 if weight is None else float(weight), rel=1e-14), label


def test_nothing_but_void_cannot_be_weighed(tmp_path):
    root = write_masks(tmp_path / "set", [[[VOID, VOID]]])
    with pytest.raises(DataError, match="void throughout"):
        class_statistics(VOCDataset(root, "train"))


def test_damaged_masks_are_named(tmp_path):
    root = write_masks(tmp_path / "set", [[[0, 1]], [[0, 4]]])
    with pytest.raises(DataError, match=r"m1\.png: label 4"):
        class_statistics(VOCDataset(root, "train"))


def test_the_toml_is_taken_by_training(tmp_path, segnet):
    root = write_masks(tmp_path / "set", BY_HAND)
    finished = segnet("data", "stats", root, "--toml", tmp_path / "out/w.toml", "--json", tmp_path / "out/w.json")
    assert finished.code == 0, finished.err
    assert load_config(tmp_path / "out/w.toml").class_weights == (0.5, 1.0, 1.8, 1.0)
    text = (tmp_path / "out/w.toml").read_text()
    assert "1.0,  # [never] seen (does not occur: neutral weight 1)" in text
    assert "void left out" in text
    result = json.loads((tmp_path / "out/w.json").read_text())
    assert result["split"] == "train"
    assert [row["pixels"] for row in result["classes"]] == [6, 3, 1, 0]
    assert [row["frequency"] for row in result["classes"]] == [0.6, 0.3, pytest.approx(1 / 6), None]
    for words in ("road", "0.30000", "1.8000", "2 masks"):
        assert words in finished.out
    assert segnet("data", "stats", root, "--split", "val").code == 1


def test_comments_do_not_end_the_line(tmp_path):
    root = write_masks(tmp_path / "set", BY_HAND)
    counted = class_statistics(VOCDataset(root, "train"))
    text = counted.to_toml("set\nseed = 7")
    (tmp_path / "w.toml").write_text(text)
    assert load_config(tmp_path / "w.toml").seed == 0


def test_progress_is_told(tmp_path):
    told = []
    root = write_masks(tmp_path / "set", BY_HAND)
    class_statistics(VOCDataset(root, "train"), progress=lambda *state: told.append(state))
    assert told == [(1, 2), (2, 2)]


def test_real_weights_are_plausible():
    """CamVid: sky, building and road are common, poles, signs, people and cyclists rare, in any account of the set."""
    dataset = VOCDataset(real("data", "CamVid"), "val")
    counted = class_statistics(dataset)
    weights = dict(zip(counted.names, counted.weights, strict=True))
    assert max(weights[name] for name in ("building", "road", "sky")) < 1
    assert min(weights[name] for name in ("pole", "sign_symbol", "pedestrian")) > 1
    assert np.median(counted.weights) == pytest.approx(1.0)
    assert statistics.ABSENT_WEIGHT == 1.0
