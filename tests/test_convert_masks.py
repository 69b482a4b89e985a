"""Tables of colours, and masks of colours converted to indexed ones."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support import raises
from support.data import empty_voc, encoded, noise

from segnet_scratch import data
from segnet_scratch.data import VOC_CLASSES, VOID, VOCDataset, colours, voc_palette
from segnet_scratch.data.conversion import convert_masks
from segnet_scratch.data.verify import verify
from segnet_scratch.errors import DataError

SIZE = (40, 48)
NAMES = ("sky", "traffic light", "road")
TABLE = "# made by hand\nsky 128 128 128\n\ntraffic light\t0 64 64\nroad 128 64 128\nroad 128 0 192\nVoid 0 0 0\n"
LABELS = {(128, 128, 128): 0, (0, 64, 64): 1, (128, 64, 128): 2, (128, 0, 192): 2, (0, 0, 0): VOID}


def coloured(seed: int, table=LABELS) -> tuple[np.ndarray, np.ndarray]:
    """A mask of random colours of the table, and its labels."""
    choice = np.random.default_rng(seed).integers(0, len(table), SIZE)
    return np.array(list(table), np.uint8)[choice], np.array(list(table.values()), np.uint8)[choice]


@pytest.fixture
def root(tmp_path):
    """A data set with colours in its masks: a, b, c for training, d for validation."""
    root = empty_voc(tmp_path / "set")
    for seed, name in enumerate("abcd"):
        (root / f"JPEGImages/{name}.jpg").write_bytes(encoded(noise(*SIZE, seed), "JPEG"))
        (root / f"SegmentationClass/{name}.png").write_bytes(encoded(coloured(seed)[0], "PNG"))
    (root / "ImageSets/Segmentation/train.txt").write_bytes(b"a\r\nb\r\nc\r\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("d\n")
    (tmp_path / "colours.txt").write_text(TABLE)
    return root


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_a_table_is_read_in_both_orders(tmp_path, turned):
    lines = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
    if turned:
        lines = [" ".join(line.split()[-3:]) + "\t" + " ".join(line.split()[:-3]) for line in lines]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    assert colours.read_colours(tmp_path / "t.txt") == colours.ColourTable(NAMES, LABELS)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("sky 1 2\n", "line 1"),
        ("sky 1 2 256\n", "line 1"),
        ("sky 1 2 -3\n", "line 1"),
        ("1 2 3\n", "line 1"),
        ("sky 1 2 3\nroad 1 2 3\n", r"line 2: colour \(1, 2, 3\) stands there twice"),
        ("", "0 classes"),
        ("void 0 0 0\n", "0 classes"),
        ("\n".join(f"c{n} {n} 0 0" for n in range(256)), "256 classes"),
        (b"sk\xff 1 2 3\n", "UTF-8"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, hint):
    (tmp_path / "t.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with raises(DataError, "t.txt", match=hint):
        colours.read_colours(tmp_path / "t.txt")


def test_the_table_of_camvid_has_32_colours_for_11_classes():
    table = colours.camvid_colours()
    assert len(table.names) == 11
    assert len(table.labels) == 32
    assert sorted(set(table.labels.values())) == [*range(11), VOID]
    for colour, name in {
        (128, 128, 128): "sky",
        (192, 0, 128): "building",  # archway
        (0, 0, 64): "pole",  # traffic cone
        (128, 0, 192): "road",  # lane marking
        (128, 128, 192): "pavement",  # road shoulder
        (0, 64, 64): "sign_symbol",  # traffic light
        (128, 64, 64): "car",  # other that moves
        (64, 128, 64): "pedestrian",  # animal
        (192, 0, 192): "bicyclist",  # motorcycle
    }.items():
        assert table.names[table.labels[colour]] == name
    assert table.labels[0, 0, 0] == VOID


def test_the_table_of_voc_is_its_palette():
    table = colours.voc_colours(VOC_CLASSES)
    labels = np.array([[*range(21), VOID]], np.uint8)
    converted, missing = colours.labels_from_colours(voc_palette()[labels], table)
    np.testing.assert_array_equal(converted, labels)
    assert not missing
    assert len(table.labels) == 22


def test_missing_colours_are_counted_and_placed():
    picture = np.zeros((3, 4, 3), np.uint8)
    picture[1, 2] = picture[2, 0] = (1, 2, 3)
    picture[0, 3] = (255, 255, 255)
    labels, missing = colours.labels_from_colours(picture, colours.ColourTable(("a",), {(0, 0, 0): 0}))
    assert missing == {(1, 2, 3): (2, 1, 2), (255, 255, 255): (1, 0, 3)}
    assert labels.shape == (3, 4)


# --- data sets -----------------------------------------------------------------------------------


def test_a_data_set_is_converted_and_trains(root, tmp_path, segnet):
    out = tmp_path / "out/new"
    finished = segnet("data", "convert-masks", root, out, "--colors", tmp_path / "colours.txt")
    assert finished.code == 0, finished.err
    assert f"4 masks in {out}" in finished.out
    train, val = VOCDataset(out, "train"), VOCDataset(out, "val")
    assert (train.names, train.ids, val.ids) == (NAMES, ("a", "b", "c"), ("d",))
    for seed, (dataset, index) in enumerate([(train, 0), (train, 1), (train, 2), (val, 0)]):
        image, mask, name = dataset.sample(index)
        np.testing.assert_array_equal(mask, coloured(seed)[1])
        assert (root / f"JPEGImages/{name}.jpg").read_bytes() == dataset.image_path(index).read_bytes()
        with Image.open(dataset.mask_path(index)) as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.array(picture.convert("RGB")), train.palette[mask])
        assert train.palette[: len(NAMES)].tolist() == [[128, 128, 128], [0, 64, 64], [128, 64, 128]]
        assert image.shape == (*SIZE, 3)
    assert verify(out).findings == ()
    settings = [f"--set={setting}" for setting in ("width=0.0625", "size=32", "steps=1", "batch=2", "workers=0")]
    trained = segnet("train", "--data", out, "--out", tmp_path / "run", "--device", "numpy", *settings)
    assert trained.code == 0, trained.err
    assert "3 classes" in trained.out


def test_voc_and_camvid_need_no_table(root, tmp_path, segnet):
    for name, table, classes in (
        ("voc", colours.voc_colours(VOC_CLASSES), 21),
        ("camvid", colours.camvid_colours(), 11),
    ):
        for seed, letter in enumerate("abcd"):
            (root / f"SegmentationClass/{letter}.png").write_bytes(encoded(coloured(seed, table.labels)[0], "PNG"))
        finished = segnet("data", "convert-masks", root, tmp_path / name, "--colors", name)
        assert finished.code == 0, finished.err
        dataset = VOCDataset(tmp_path / name, "val")
        assert dataset.classes == classes
        np.testing.assert_array_equal(dataset.sample(0)[1], coloured(3, table.labels)[1])


def test_colours_count_whatever_the_mode_of_the_file(root, tmp_path):
    picture = Image.fromarray(coloured(0)[0])
    picture.quantize(16).save(root / "SegmentationClass/a.png")  # a palette in any order
    picture.convert("RGBA").save(root / "SegmentationClass/b.png")
    Image.fromarray(np.full(SIZE, 128, np.uint8)).save(root / "SegmentationClass/c.png")
    convert_masks(root, tmp_path / "new", colours.read_colours(tmp_path / "colours.txt"))
    dataset = VOCDataset(tmp_path / "new", "train")
    for index in range(2):
        np.testing.assert_array_equal(dataset.sample(index)[1], coloured(0)[1])
    np.testing.assert_array_equal(dataset.sample(2)[1], 0)


def test_unknown_colours_are_named_with_place_and_count_and_nothing_is_written(root, tmp_path, segnet):
    picture = coloured(1)[0]
    picture[7, 5] = picture[9, 1] = (1, 2, 3)
    picture[0, 1] = (255, 0, 255)
    (root / "SegmentationClass/b.png").write_bytes(encoded(picture, "PNG"))
    (root / "SegmentationClass/c.png").write_bytes(encoded(noise(*SIZE), "PNG"))
    before = sorted(tmp_path.iterdir())
    finished = segnet("data", "convert-masks", root, tmp_path / "new", "--colors", tmp_path / "colours.txt")
    assert finished.code == 1
    assert "2 of 4 masks hold colours that the table lacks; nothing was written" in finished.err
    assert (
        "b.png: (1, 2, 3) (pixels: 2, first at row 7, column 5); (255, 0, 255) (pixels: 1, first at row 0, column 1)\n"
        in finished.err
    )
    assert "c.png: " in finished.err
    assert "more colours" in finished.err
    assert sorted(tmp_path.iterdir()) == before


def refuse_16_bit(root):
    (root / "SegmentationClass/b.png").write_bytes(encoded(np.zeros(SIZE, np.uint16), "PNG"))


def refuse_transparency(root):
    picture = Image.fromarray(coloured(1)[0]).convert("RGBA")
    picture.putpixel((3, 8), (0, 0, 0, 7))
    picture.save(root / "SegmentationClass/b.png")


def refuse_jpeg(root):
    (root / "SegmentationClass/b.png").write_bytes(encoded(coloured(1)[0], "JPEG"))


def refuse_missing(root):
    (root / "SegmentationClass/b.png").unlink()


def refuse_no_lists(root):
    for path in (root / "ImageSets/Segmentation").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (refuse_16_bit, "b.png: 16-bit"),
        (refuse_transparency, "b.png: 1 pixels are transparent, first at row 8, column 3"),
        (refuse_jpeg, "b.png: not readable as PNG"),
        (refuse_missing, "1 of 3 masks are missing"),
        (refuse_no_lists, "expected lists"),
    ],
)
def test_what_cannot_be_converted_is_named(root, tmp_path, damage, hint):
    damage(root)
    with pytest.raises(DataError, match=hint):
        convert_masks(root, tmp_path / "new", colours.read_colours(tmp_path / "colours.txt"))
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*segnet-tmp"))


def test_a_folder_that_holds_something_is_left_alone(root, tmp_path):
    table = colours.read_colours(tmp_path / "colours.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    for target in (tmp_path / "full", root):
        with pytest.raises(DataError, match="is there already"):
            convert_masks(root, target, table)
    assert (tmp_path / "full/note").read_text() == "mine"
    (tmp_path / "hollow").mkdir()
    assert convert_masks(root, tmp_path / "hollow", table) == 4


def test_an_interruption_leaves_nothing(root, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert_masks(root, tmp_path / "new", colours.read_colours(tmp_path / "colours.txt"), progress=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_a_set_with_its_own_classes_trains_and_is_weighed(sample, tmp_path, segnet):
    """Another data set in VOC layout, with its own labels.txt: verified, weighed, trained with the weights."""
    root = tmp_path / "set"
    shutil.copytree(sample, root)
    assert segnet("data", "verify", root, "--json", tmp_path / "report.json").code == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["pixels"]) == 7
    assert segnet("data", "stats", root, "--toml", tmp_path / "weights.toml").code == 0
    settings = [f"--set={setting}" for setting in ("width=0.0625", "size=32", "steps=1", "batch=2", "workers=0")]
    arguments = ("--data", root, "--out", tmp_path / "run", "--device", "numpy", "--config", tmp_path / "weights.toml")
    trained = segnet("train", *arguments, *settings)
    assert trained.code == 0, trained.err
    assert "6 classes" in trained.out
    assert data.class_names(root)[0] == "background"
