"""Data: reading VOC layout, and refusing what is damaged."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import raises, real
from support.data import chunk, encoded, noise, png

from segnet_scratch import data
from segnet_scratch.data.palette import class_palette
from segnet_scratch.data.voc import split_files
from segnet_scratch.errors import DataError

# --- palette -------------------------------------------------------------------------------------


def test_palette_has_the_colours_of_voc():
    palette = data.voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    known = {
        "background": (0, 0, 0),
        "aeroplane": (128, 0, 0),
        "bicycle": (0, 128, 0),
        "bottle": (128, 0, 128),
        "cat": (64, 0, 0),
        "person": (192, 128, 128),
        "pottedplant": (0, 64, 0),
        "tvmonitor": (0, 64, 128),
    }
    for name, colour in known.items():
        assert tuple(palette[data.VOC_CLASSES.index(name)]) == colour, name
    assert tuple(palette[data.VOID]) == (224, 224, 192)
    assert len(np.unique(palette, axis=0)) == 256
    assert len(set(data.VOC_CLASSES)) == 21


def test_colours_of_own_classes_are_told_apart():
    for background in (False, True):
        names = ["background" if background else "sky", *(f"kind {k}" for k in range(1, 12))]
        palette = class_palette(names)
        colours = palette[: len(names)].astype(float)
        apart = np.linalg.norm(colours[:, None] - colours, axis=2)[~np.eye(len(names), dtype=bool)]
        assert apart.min() > 75  # of 441; VOC's first twelve have 64
        assert (palette[0] == 0).all() == background
        np.testing.assert_array_equal(palette[len(names) :], data.voc_palette()[len(names) :])
    np.testing.assert_array_equal(class_palette(data.VOC_CLASSES), data.voc_palette())
    assert len(np.unique(class_palette([f"c{k}" for k in range(255)]), axis=0)) == 256


def test_the_palette_of_a_set_is_that_of_its_labels_file_else_of_its_masks(voc):
    def palette():
        return data.VOCDataset(voc, "train").palette

    np.testing.assert_array_equal(palette(), data.voc_palette())  # VOC's classes
    names = [f"kind {k}" for k in range(21)]
    (voc / "labels.txt").write_text("\n".join(names))
    np.testing.assert_array_equal(palette(), class_palette(names))  # the masks have VOC's, which means nothing
    own = np.roll(data.voc_palette(), 1, axis=1)
    data.save_indexed_png(voc / "SegmentationClass/a.png", data.read_mask(voc / "SegmentationClass/a.png", 21), own)
    np.testing.assert_array_equal(palette()[:21], own[:21])
    (voc / "labels.txt").write_text("\n".join(f"{name} {k} 255 {k}" for k, name in enumerate(names)))
    assert data.VOCDataset(voc, "train").names == tuple(names)
    np.testing.assert_array_equal(palette()[:21], [(k, 255, k) for k in range(21)])
    (voc / "SegmentationClass/a.png").write_bytes(b"no mask")
    (voc / "labels.txt").write_text("\n".join(names))
    np.testing.assert_array_equal(palette(), class_palette(names))


@pytest.mark.parametrize("content", ["a 1 2 3\nb", "a 1 2 3\nb 1 2 3"])
def test_colours_of_some_classes_only_or_twice_are_refused(voc, content):
    (voc / "labels.txt").write_text(content)
    with pytest.raises(DataError, match=r"labels\.txt: 1 colours for 2 classes"):
        data.class_names(voc)


@pytest.mark.parametrize("name", ["Labels.txt", "LABELS.TXT", "labels.txt.txt"])
def test_a_labels_file_of_another_name_is_not_taken_for_none(voc, name):
    (voc / name).write_text("a\nb\n")
    with pytest.raises(DataError, match=rf"{name}: would be passed over; rename it to labels\.txt"):
        data.class_names(voc)


def test_a_labels_file_that_is_a_link_to_nowhere_is_not_taken_for_none(voc):
    (voc / "labels.txt").symlink_to(voc / "elsewhere.txt")
    with pytest.raises(DataError, match=r"labels\.txt: is a link to nowhere"):
        data.class_names(voc)


def test_indexed_png_holds_indices_and_the_palette(tmp_path):
    labels = np.arange(256, dtype=np.int64).reshape(8, 32)
    data.save_indexed_png(tmp_path / "all.png", labels)
    picture = Image.open(tmp_path / "all.png")
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.array(picture), labels)
    np.testing.assert_array_equal(np.array(picture.convert("RGB")), data.voc_palette()[labels])
    np.testing.assert_array_equal(data.read_mask(tmp_path / "all.png", 255), labels)


@pytest.mark.parametrize(
    "labels", [np.zeros((2, 2)), np.full((2, 2), 256), np.full((2, 2), -1), np.zeros((1, 2, 2), np.uint8)]
)
def test_labels_that_are_no_map_are_not_written(tmp_path, labels):
    with pytest.raises(DataError, match=r"out\.png"):
        data.save_indexed_png(tmp_path / "out.png", labels)
    assert not (tmp_path / "out.png").exists()


def test_writing_into_a_missing_folder_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.out\.png"):
        data.save_indexed_png(tmp_path / "nowhere" / "out.png", np.zeros((2, 2), np.uint8))


# --- real data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "train", "val"), [(("VOCdevkit", "VOC2012"), 887, 200), (("CamVid",), 367, 101)])
def test_real_data_is_read_whole(parts, train, val):
    root = real("data", *parts)
    dataset = data.VOCDataset(root, "val")
    assert len(dataset) == val
    assert len(data.VOCDataset(root, "train")) == train
    seen = np.zeros(256, np.int64)
    for index in range(val):
        image, mask, name = dataset.sample(index)
        assert (image.dtype, mask.dtype, name) == (np.uint8, np.uint8, dataset.ids[index])
        assert image.shape == (*mask.shape, 3)
        seen += np.bincount(mask.ravel(), minlength=256)
    assert seen[: dataset.classes].all(), "every class occurs in val"
    assert not seen[dataset.classes : data.VOID].any()


def test_camvid_brings_its_own_names():
    dataset = data.VOCDataset(real("data", "CamVid"), "val")
    assert dataset.classes == 11
    assert dataset.names[0] == "sky"
    assert dataset.names[-1] == "bicyclist"


def test_palette_equals_the_one_inside_voc_files():
    root = real("data", "VOCdevkit", "VOC2012")
    dataset = data.VOCDataset(root, "val")
    for index in range(10):
        with Image.open(dataset.mask_path(index)) as picture:
            np.testing.assert_array_equal(
                np.array(picture.convert("RGB")), data.voc_palette()[dataset.sample(index)[1]]
            )


def test_root_of_real_voc_is_found_from_above():
    root = real("data", "VOCdevkit", "VOC2012")
    assert (
        data.find_root(real("data")) == data.find_root(real("data", "VOCdevkit")) == data.find_root(str(root)) == root
    )


# --- root, names and splits ----------------------------------------------------------------------


def test_a_healthy_set_is_read(voc):
    dataset = data.VOCDataset(voc, "train")
    assert len(dataset) == 8
    assert (dataset.root, dataset.split, dataset.ids[:2], dataset.classes) == (voc, "train", ("a", "b"), 21)
    image, mask, name = dataset.sample(2)
    assert name == "c"
    np.testing.assert_array_equal(image, np.array(Image.open(voc / "JPEGImages/c.jpg")))
    np.testing.assert_array_equal(mask, np.array(Image.open(voc / "SegmentationClass/c.png")))


def test_root_is_found_in_three_places(voc, tmp_path):
    for parent in ("one/VOC2012", "two/VOCdevkit/VOC2012"):
        (tmp_path / parent).parent.mkdir(parents=True)
        (tmp_path / parent).symlink_to(voc, target_is_directory=True)
    assert data.find_root(voc) == voc
    assert data.find_root(tmp_path / "one") == tmp_path / "one/VOC2012"
    assert data.find_root(tmp_path / "two") == tmp_path / "two/VOCdevkit/VOC2012"


def test_files_that_operating_systems_leave_are_no_lists(voc):
    for name in ("._train.txt", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (voc / "ImageSets/Segmentation" / name).write_bytes(b"\0\5\x16\7" + bytes(40))
    assert list(split_files(voc)) == ["train", "val"]
    with pytest.raises(DataError, match=r"splits in .*: train, val\."):
        data.read_split(voc, "test")


def test_a_missing_root_lists_what_was_looked_for(voc):
    (voc / "SegmentationClass").rename(voc / "masks")
    with raises(DataError, f"{voc}: lacks SegmentationClass", str(voc / "VOCdevkit" / "VOC2012")):
        data.find_root(voc)


def test_labels_file_gives_the_names(voc):
    (voc / "labels.txt").write_bytes(b"\xef\xbb\xbfsky\r\n\r\n  road \r\ntree\n\n")
    assert data.class_names(voc) == ("sky", "road", "tree")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"sky\nroad\nsky\n", "'sky' stands there twice"),
        ("\n".join(f"c{n}" for n in range(256)).encode(), "256 class names"),
        (b"sk\xff\xfe\n", "UTF-8"),
    ],
)
def test_bad_labels_files_are_refused(voc, content, hint):
    (voc / "labels.txt").write_bytes(content)
    with raises(DataError, hint, match=r"labels\.txt"):
        data.VOCDataset(voc, "train")


def test_255_classes_fit_beside_void(voc):
    (voc / "labels.txt").write_text("\n".join(f"c{n}" for n in range(255)))
    assert data.VOCDataset(voc, "train").classes == 255


@pytest.mark.parametrize("split", ["test", "", "../train", "a/b", ".", "train\n", "x" * 300])
def test_a_missing_split_lists_those_that_exist(voc, split):
    with raises(DataError, repr(f"{split}.txt")[1:-1], match="train, val"):
        data.read_split(voc, split)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "got none"),
        (b"\n\n  \n", "got none"),
        (b"a\nb\na\n", "'a' stands there twice"),
        (b"a\n../a\n", "line 2"),
        (b"..\n", "line 1"),
        (b"..\\a\n", "line 1"),
        (b"/etc/passwd\n", "line 1"),
        (b"sub/a\n", "line 1"),
        (b"sub\\a\n", "line 1"),
        (b"C:a\n", "line 1"),
        (b"a 1\n", "line 1"),
        (b"a\x00b\n", "line 1"),
        (b".hidden\n", "line 1"),
        (b"x" * 300, "line 1"),
        (b"a\xff\n", "UTF-8"),
    ],
)
def test_bad_splits_are_refused(voc, content, hint):
    (voc / "ImageSets/Segmentation/odd.txt").write_bytes(content)
    with raises(DataError, hint, match=r"odd\.txt"):
        data.VOCDataset(voc, "odd")


def test_split_order_is_kept_and_line_ends_do_not_matter(voc):
    (voc / "ImageSets/Segmentation/odd.txt").write_bytes(b"\xef\xbb\xbfc\r\n\r\na\r\nb")
    assert data.read_split(voc, "odd") == ["c", "a", "b"]


# --- pairs ---------------------------------------------------------------------------------------


def test_all_missing_files_are_counted_before_training(voc):
    for name in "abcdefg":
        (voc / "SegmentationClass" / f"{name}.png").unlink()
    (voc / "JPEGImages/h.jpg").unlink()
    with pytest.raises(DataError) as caught:
        data.VOCDataset(voc, "train")
    text = str(caught.value)
    assert "1 of 8 images are missing" in text
    assert str(voc / "JPEGImages/h.jpg") in text
    assert "7 of 8 masks are missing" in text
    assert str(voc / "SegmentationClass/e.png") in text
    assert "and 2 more" in text
    assert "f.png" not in text


@pytest.mark.parametrize("kind", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_a_file_lost_after_the_check_is_named(voc, kind):
    dataset = data.VOCDataset(voc, "train")
    (voc / kind).unlink()
    with raises(DataError, str(voc / kind), match="no such file"):
        dataset.sample(1)


def test_a_mask_of_another_size_is_refused(voc):
    data.save_indexed_png(voc / "SegmentationClass/b.png", np.zeros((30, 20), np.uint8))
    with raises(DataError, "20 x 30", str(voc / "SegmentationClass/b.png"), match="30 x 20"):
        data.VOCDataset(voc, "train").sample(1)


def test_png_images_are_taken_too(voc):
    (voc / "JPEGImages/b.jpg").unlink()
    (voc / "JPEGImages/b.png").write_bytes(encoded(noise(), "PNG"))
    np.testing.assert_array_equal(data.VOCDataset(voc, "train").sample(1)[0], noise())


# --- masks ---------------------------------------------------------------------------------------


def test_a_wrong_label_is_named_with_count_and_place(voc):
    mask = np.zeros((20, 30), np.uint8)
    mask[7, 5] = mask[9, 1:3] = 77
    path = voc / "SegmentationClass/b.png"
    data.save_indexed_png(path, mask)
    with raises(DataError, str(path), "label 77 in 3 pixels", "row 7, column 5", "0..20", "255"):
        data.VOCDataset(voc, "train").sample(1)


@pytest.mark.parametrize("label", [21, 254])
def test_labels_just_outside_are_refused_and_just_inside_are_not(tmp_path, label):
    data.save_indexed_png(tmp_path / "m.png", np.array([[20, label, 255]], np.uint8))
    with pytest.raises(DataError, match=f"label {label} in 1 pixels"):
        data.read_mask(tmp_path / "m.png", 21)
    data.save_indexed_png(tmp_path / "m.png", np.array([[20, 0, 255]], np.uint8))
    assert data.read_mask(tmp_path / "m.png", 21).tolist() == [[20, 0, 255]]


def test_grey_masks_are_read_as_numbers_whatever_their_depth(tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(encoded(np.array([[0, 3, 255, 20]], np.uint8), "PNG"))
    assert data.read_mask(path, 21).tolist() == [[0, 3, 255, 20]]
    path.write_bytes(png(4, 1, 4, 0, bytes([0, 0x01, 0x2F])))
    assert data.read_mask(path, 21).tolist() == [[0, 1, 2, 15]]
    path.write_bytes(png(4, 1, 2, 0, bytes([0, 0b00011011])))
    assert data.read_mask(path, 21).tolist() == [[0, 1, 2, 3]]
    path.write_bytes(png(8, 1, 1, 0, bytes([0, 0b01000001])))
    assert data.read_mask(path, 21).tolist() == [[0, 1, 0, 0, 0, 0, 0, 1]]


def test_one_flipped_bit_does_not_pass_as_other_labels(tmp_path):
    path = tmp_path / "m.png"
    mask = data.draw_sample((96, 128), data.sample_rng(0, 0, 0))[1]  # large even regions, as in real masks
    data.save_indexed_png(path, mask)
    content = path.read_bytes()
    refused = 0
    for position in range(content.index(b"IDAT"), len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            np.testing.assert_array_equal(data.read_mask(path, 6), mask)
        except DataError:
            refused += 1
    assert refused > 0.9 * (len(content) - content.index(b"IDAT"))


def test_masks_of_few_colours_and_any_palette_keep_their_indices(tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(png(4, 1, 4, 3, bytes([0, 0x01, 0x2F]), palette=bytes(range(48))[::-1]))
    assert data.read_mask(path, 21).tolist() == [[0, 1, 2, 15]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_coded_mask_is_refused_with_the_reason(tmp_path, mode):
    path = tmp_path / "m.png"
    path.write_bytes(encoded(data.voc_palette()[np.ones((4, 4), np.uint8)], "PNG", mode))
    with raises(DataError, str(path), "palette indices", match="colour-coded"):
        data.read_mask(path, 21)


# --- images --------------------------------------------------------------------------------------


def test_images_of_every_mode_become_rgb(tmp_path):
    rgb = np.array(Image.fromarray(noise()).convert("P").convert("RGB"))  # colours that a palette holds
    grey = np.array(Image.fromarray(rgb).convert("L"))
    path = tmp_path / "i.png"
    path.write_bytes(encoded(rgb, "PNG", "P"))
    np.testing.assert_array_equal(data.read_image(path), rgb)
    path.write_bytes(encoded(rgb, "PNG", "RGBA"))
    np.testing.assert_array_equal(data.read_image(path), rgb)
    path.write_bytes(encoded(grey, "PNG"))
    np.testing.assert_array_equal(data.read_image(path), np.dstack([grey] * 3))
    path.write_bytes(encoded(grey.astype(np.uint16) * 256 + 7, "PNG"))
    np.testing.assert_array_equal(data.read_image(path), np.dstack([grey] * 3))
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    path.write_bytes(encoded(flat, "JPEG", "CMYK", quality=100))
    assert np.abs(data.read_image(path).astype(int) - flat).max() <= 3


def test_only_prediction_turns_by_exif_and_reads_more_formats(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "i.jpg"
    path.write_bytes(encoded(noise(20, 30), "JPEG", exif=exif))
    assert data.read_image(path).shape == (20, 30, 3)
    upright = data.read_image(path, for_prediction=True)
    np.testing.assert_array_equal(upright, np.rot90(data.read_image(path), -1))
    for file_format in ("BMP", "WEBP", "TIFF"):
        path.write_bytes(encoded(noise(), file_format))
        assert data.read_image(path, for_prediction=True).shape == (20, 30, 3)
        with pytest.raises(DataError, match=r"i\.jpg.*magick"):
            data.read_image(path)
    path.write_bytes(encoded(noise(), "GIF"))
    with pytest.raises(DataError, match=r"i\.jpg.*JPEG or PNG or BMP or WEBP or TIFF.*magick"):
        data.read_image(path, for_prediction=True)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 65535])
def test_orientations_of_exif_turn_as_they_say_and_others_do_not(tmp_path, file_format, turn):
    stored = np.repeat(np.repeat(noise(4, 6), 8, axis=0), 8, axis=1)  # blocks that compression leaves alone
    exif = Image.Exif()
    exif[274] = turn
    path = tmp_path / "i.x"
    lossless = {"lossless": True} if file_format == "WEBP" else {"quality": 100, "subsampling": 0}
    path.write_bytes(encoded(stored, file_format, exif=exif, **(lossless if file_format in ("JPEG", "WEBP") else {})))
    # row, column of the stored picture that is shown at the top left, and at the top right (EXIF 2.3, table 6)
    corners = {2: (1, 0), 3: (3, 2), 4: (2, 3), 5: (0, 2), 6: (2, 0), 7: (3, 1), 8: (1, 3)}
    ends = [stored[0, 0], stored[0, -1], stored[-1, 0], stored[-1, -1]]
    left, right = corners.get(turn, (0, 1))
    seen = data.read_image(path, for_prediction=True)
    assert seen.shape[:2] == ((48, 32) if turn in (5, 6, 7, 8) else (32, 48))
    assert np.abs(seen[0, 0].astype(int) - ends[left]).max() <= 12
    assert np.abs(seen[0, -1].astype(int) - ends[right]).max() <= 12


def _tiff_header(entries):
    """EXIF data of little-endian entries (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


UNREADABLE_EXIF = {
    "no TIFF header": (chunk(b"eXIf", bytes(range(32))), True),
    "cut off": (chunk(b"eXIf", b"II*\0"), True),
    "empty": (chunk(b"eXIf", b""), False),
    "text that is no hexadecimal": (chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzzzz\n"), True),
    "an orientation that is text": (chunk(b"eXIf", _tiff_header([(274, 2, 2, ord("6"))])), False),
    "an orientation that is a fraction": (chunk(b"eXIf", _tiff_header([(274, 5, 1, 8)])), False),
    "another tag out of reach": (chunk(b"eXIf", _tiff_header([(271, 2, 99, 1 << 30), (274, 3, 1, 1)])), False),
    "another tag of no type": (chunk(b"eXIf", _tiff_header([(282, 99, 1, 0), (274, 3, 1, 1)])), False),
}


@pytest.mark.parametrize("fault", UNREADABLE_EXIF)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the same
def test_unreadable_exif_is_said_and_the_picture_is_read(tmp_path, caplog, fault):
    extra, said = UNREADABLE_EXIF[fault]
    pixels = noise(8, 9)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    path = tmp_path / "i.png"
    path.write_bytes(png(9, 8, 8, 2, rows, extra=extra))
    np.testing.assert_array_equal(data.read_image(path, for_prediction=True), pixels)
    np.testing.assert_array_equal(data.read_image(path), pixels)
    if said:
        assert "i.png: its EXIF data cannot be read" in caplog.text


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_a_tiff_of_more_than_16_bits_says_how_to_convert(tmp_path, mode, dtype):
    path = tmp_path / "i.tif"
    Image.fromarray(np.zeros((8, 9), dtype), mode).save(path)
    with pytest.raises(DataError, match=rf"i\.tif: pixels of mode {mode}; convert it.*magick .*i-8bit\.png"):
        data.read_image(path, for_prediction=True)


def test_a_16_bit_tiff_keeps_its_upper_bits(tmp_path):
    grey = noise(8, 9)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(tmp_path / "i.tif")
    np.testing.assert_array_equal(data.read_image(tmp_path / "i.tif", for_prediction=True), np.dstack([grey] * 3))


JPEG = encoded(noise(60, 80), "JPEG")
PNG = encoded(noise(60, 80), "PNG")
DAMAGED = {
    "empty": b"",
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "truncated PNG": PNG[: len(PNG) // 2],
    "only a JPEG header": JPEG[:20],
    "only a PNG header": PNG[:40],
    "JPEG with a broken frame": JPEG.replace(b"\xff\xc0", b"\xff\xc5", 1),
    "text": b"<html>404 not found</html>",
    "zeros": bytes(1000),
    "TIFF": encoded(noise(), "TIFF"),
    "GIF": encoded(noise(), "GIF"),
    "flipped bit in the PNG's pixels": PNG[:200] + bytes([PNG[200] ^ 4]) + PNG[201:],
    "text bomb": png(4, 1, 8, 0, bytes(5), extra=chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(9_000_000)))),
    "bomb": png(60000, 60000, 8, 0, b"\x00" * 100),
    "just too large": png(8001, 8000, 8, 0, b"\x00" * 100),
}


REASONS = {"empty": "0 bytes", "truncated PNG": "cut off", "text": "html", "bomb": "64,000,000"}
REASONS["just too large"] = REASONS["bomb"]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures_are_named(tmp_path, name):
    path = tmp_path / "broken.jpg"
    path.write_bytes(DAMAGED[name])
    for read in (data.read_image, lambda file: data.read_mask(file, 21)):
        with raises(DataError, str(path), REASONS.get(name, "")):
            read(path)


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(DataError, match=r"x\.jpg"):
        data.read_image(tmp_path / "x.jpg")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files through /proc")
def test_damaged_files_do_not_stay_open(tmp_path):
    path = tmp_path / "broken.jpg"
    kept = []  # an exception kept alive keeps its frames, and with them whatever they still hold open
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in DAMAGED:
        path.write_bytes(DAMAGED[name])
        with pytest.raises(DataError) as caught:
            data.read_image(path)
        kept.append(caught)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
