"""Mistakes in the numbers of masks: said by training and by verification, and mended by the command that they name."""

import logging
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from support.data import empty_voc, encoded, noise

from segnet_scratch.config import Config
from segnet_scratch.data import VOC_CLASSES, VOID, VOCDataset, read_mask, save_indexed_png, voc_palette
from segnet_scratch.data.colours import parse_relabelling
from segnet_scratch.data.conversion import convert_masks
from segnet_scratch.data.suspicions import look_over
from segnet_scratch.data.verify import verify
from segnet_scratch.errors import ConfigError, DataError
from segnet_scratch.train import Trainer

SIZE = (32, 84)


def make(root, names, values, palette=None, grey=True):
    """A data set whose masks are made of vertical bands of these numbers."""
    empty_voc(root)
    mask = np.repeat(np.array(values, np.uint8), -(-SIZE[1] // len(values)))[None, : SIZE[1]].repeat(SIZE[0], axis=0)
    for seed, name in enumerate("abcd"):
        (root / f"JPEGImages/{name}.jpg").write_bytes(encoded(noise(*SIZE, seed), "JPEG"))
        if grey:
            Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
        else:
            save_indexed_png(root / f"SegmentationClass/{name}.png", mask, palette)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\nc\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("d\n")
    if names:
        (root / "labels.txt").write_text("\n".join(names) + "\n")
    return root


CASES = {
    "0 and 255": (["background", "object"], [0, VOID], "labels-0-and-255", [0, 1], ("background", "object")),
    "void as a class": (["road", "sky", "unlabelled"], [0, 1, 2], "void-as-class", [0, 1, VOID], ("road", "sky")),
    "void as the first class": (["Void", "sky", "road"], [0, 1, 2], "void-as-class", [VOID, 0, 1], ("sky", "road")),
    "from 1": (["road", "sky", "car", "tree"], [1, 2, 3], "labels-from-1", [0, 1, 2], ("road", "sky", "car", "tree")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_said_by_both_and_mended_by_its_command(tmp_path, segnet, caplog, case):
    names, values, code, mended, names_after = CASES[case]
    root = make(tmp_path / "set", names, values)
    (finding,) = verify(root).by_code()[code]
    assert not finding.is_error
    assert finding in look_over(VOCDataset(root, "train"))
    with caplog.at_level(logging.WARNING):
        Trainer(Config(width=0.0625, size=32, batch=2, steps=1), root, tmp_path / "run", "numpy")
    assert finding.detail in caplog.text
    command = re.search(r"segnet (data convert .*')\.", finding.detail)[1]
    command = shlex.split(command.replace("NEW", str(tmp_path / "new")))
    assert segnet(*command).code == 0
    dataset = VOCDataset(tmp_path / "new", "train")
    assert dataset.names == names_after
    np.testing.assert_array_equal(dataset.sample(0)[1][0, :: SIZE[1] // len(values)][: len(values)], mended)
    assert code not in verify(tmp_path / "new").by_code()


def test_numbers_out_of_range_name_the_ways_out(tmp_path):
    root = make(tmp_path / "set", ["road", "sky"], [0, 1, 2])
    with pytest.raises(DataError, match=r"label 2 .*--relabel '2=void'.*--relabel '0=void,1=0,2=1'"):
        VOCDataset(root, "train").sample(0)
    assert verify(root).by_code()["label-out-of-range"]
    convert_masks(root, tmp_path / "new", parse_relabelling("2=void", ["road", "sky"]))
    assert set(np.unique(read_mask(tmp_path / "new/SegmentationClass/a.png", 2))) == {0, 1, VOID}
    with pytest.raises(DataError, match=r"4 of 4 masks hold numbers that are no class(.|\n)*a\.png: 2"):
        convert_masks(root, tmp_path / "other", parse_relabelling("0=1", ["road", "sky"]))
    assert not (tmp_path / "other").exists()


def test_a_palette_that_is_not_vocs_is_suspected_only_without_names(tmp_path):
    own = np.roll(voc_palette(), 1, axis=1)
    root = make(tmp_path / "set", None, [0, 1, 2, 3], own, grey=False)
    assert "palette-not-voc" in verify(root).by_code()
    assert "palette-not-voc" in {finding.code for finding in look_over(VOCDataset(root, "train"))}
    (root / "labels.txt").write_text("\n".join(VOC_CLASSES))
    assert "palette-not-voc" not in verify(root).by_code()
    sound = make(tmp_path / "voc", None, range(21), voc_palette(), grey=False)
    assert look_over(VOCDataset(sound, "train")) == []


def test_looking_over_ends_where_every_class_was_seen_and_survives_damage(tmp_path, monkeypatch):
    root = make(tmp_path / "set", ["a", "b"], [0, 1])
    (root / "SegmentationClass/a.png").write_bytes(b"")
    dataset = VOCDataset(root, "train")
    assert look_over(dataset) == look_over(dataset, workers=0) == []
    (root / "labels.txt").write_text("a\nb\nc")
    (finding,) = look_over(VOCDataset(root, "train"))
    assert finding.code == "class-absent"
    assert "2 of the 3 masks have no pixel of c" in finding.detail


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("x=1", "x=1"),
        ("0=9", "below 2"),
        ("0", "OLD=NEW"),
        ("0=1,0=void", "twice"),
        ("0=void,1=void", "no class"),
        ("-1=0", "0..255"),
    ],
)
def test_relabellings_that_make_no_sense_are_refused(text, hint):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        parse_relabelling(text, ["road", "sky"])


def test_a_class_that_another_takes_over_is_kept():
    merged = parse_relabelling("sky=road,car=1", ["road", "sky", "car"])
    assert (merged.names, merged.kept) == (("road", "sky"), (0, 1))
    assert merged.lookup[:3].tolist() == [0, 0, 1]
