"""Data: reading VOC layout, refusing damage, transforms, the loader's order, the synthetic sample."""

import hashlib
import io
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segnet_scratch import data
from segnet_scratch.data import (
    SAMPLE_CLASSES,
    VOC_CLASSES,
    VOID,
    EvalTransform,
    Loader,
    TrainTransform,
    VOCDataset,
    epoch_order,
    find_root,
    normalise,
    ordered_map,
    read_image,
    read_mask,
    read_split,
    resize_image,
    resize_mask,
    sample_rng,
    write_sample,
)
from segnet_scratch.errors import DataError, DTypeError, SegnetError, ShapeError

REAL_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def real_root(*parts: str) -> Path:
    root = REAL_DATA.joinpath(*parts)
    if not root.is_dir():
        pytest.skip(f"no real data at {root}")
    return root


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    depth: int,
    colour_type: int,
    rows: bytes,
    palette: bytes = b"",
    extra: bytes = b"",
) -> bytes:
    """A PNG written by hand, for what Pillow would not write. `rows` include the filter byte of each row."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
        + (chunk(b"PLTE", palette) if palette else b"")
        + extra
        + chunk(b"IDAT", zlib.compress(rows, level=0))
        + chunk(b"IEND", b"")
    )


def encoded(array: np.ndarray, file_format: str, mode: str | None = None, **options: object) -> bytes:
    picture = Image.fromarray(array)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, format=file_format, **options)
    return buffer.getvalue()


def noise(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A small, healthy data set: ids a, b, c, ..., 8 images of 20 x 30 in split train, 2 of them in val."""
    root = tmp_path / "set"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    ids = list("abcdefgh")
    for number, name in enumerate(ids):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(encoded(noise(seed=number), "JPEG"))
        mask = np.random.default_rng(number).integers(0, 21, (20, 30)).astype(np.uint8)
        mask[:2] = VOID
        data.save_indexed_png(root / "SegmentationClass" / f"{name}.png", mask)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    return root


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
        assert tuple(palette[VOC_CLASSES.index(name)]) == colour, name
    assert tuple(palette[VOID]) == (224, 224, 192)
    assert len(np.unique(palette, axis=0)) == 256
    assert len(set(VOC_CLASSES)) == 21


def test_indexed_png_holds_indices_and_the_palette(tmp_path):
    labels = np.arange(256, dtype=np.int64).reshape(8, 32)
    data.save_indexed_png(tmp_path / "all.png", labels)
    picture = Image.open(tmp_path / "all.png")
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.array(picture), labels)
    np.testing.assert_array_equal(np.array(picture.convert("RGB")), data.colourise(labels))
    np.testing.assert_array_equal(read_mask(tmp_path / "all.png", 255), labels)


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
    root = real_root(*parts)
    dataset = VOCDataset(root, "val")
    assert len(dataset) == val
    assert len(VOCDataset(root, "train")) == train
    seen = np.zeros(256, np.int64)
    for index in range(val):
        image, mask, name = dataset.sample(index)
        assert (image.dtype, mask.dtype, name) == (np.uint8, np.uint8, dataset.ids[index])
        assert image.shape == (*mask.shape, 3)
        seen += np.bincount(mask.ravel(), minlength=256)
    assert seen[: dataset.classes].all(), "every class occurs in val"
    assert not seen[dataset.classes : VOID].any()


def test_camvid_brings_its_own_names():
    dataset = VOCDataset(real_root("CamVid"), "val")
    assert dataset.classes == 11
    assert dataset.names[0] == "sky"
    assert dataset.names[-1] == "bicyclist"


def test_palette_equals_the_one_inside_voc_files():
    root = real_root("VOCdevkit", "VOC2012")
    dataset = VOCDataset(root, "val")
    for index in range(10):
        with Image.open(dataset.mask_path(index)) as picture:
            np.testing.assert_array_equal(np.array(picture.convert("RGB")), data.colourise(dataset.sample(index)[1]))


def test_root_of_real_voc_is_found_from_above():
    root = real_root("VOCdevkit", "VOC2012")
    assert find_root(REAL_DATA) == find_root(REAL_DATA / "VOCdevkit") == find_root(str(root)) == root


# --- root, names and splits ----------------------------------------------------------------------


def test_a_healthy_set_is_read(voc):
    dataset = VOCDataset(voc, "train")
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
    assert find_root(voc) == voc
    assert find_root(tmp_path / "one") == tmp_path / "one/VOC2012"
    assert find_root(tmp_path / "two") == tmp_path / "two/VOCdevkit/VOC2012"


def test_a_missing_root_lists_what_was_looked_for(voc):
    (voc / "SegmentationClass").rename(voc / "masks")
    with pytest.raises(DataError) as caught:
        find_root(voc)
    text = str(caught.value)
    assert f"{voc}: lacks SegmentationClass" in text
    assert str(voc / "VOCdevkit" / "VOC2012") in text


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
    with pytest.raises(DataError, match=r"labels\.txt") as caught:
        VOCDataset(voc, "train")
    assert hint in str(caught.value)


def test_255_classes_fit_beside_void(voc):
    (voc / "labels.txt").write_text("\n".join(f"c{n}" for n in range(255)))
    assert VOCDataset(voc, "train").classes == 255


@pytest.mark.parametrize("split", ["test", "", "../train", "a/b", ".", "train\n", "x" * 300])
def test_a_missing_split_lists_those_that_exist(voc, split):
    with pytest.raises(DataError, match="train, val") as caught:
        read_split(voc, split)
    assert f"{split}.txt" in str(caught.value)


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
    with pytest.raises(DataError, match=r"odd\.txt") as caught:
        VOCDataset(voc, "odd")
    assert hint in str(caught.value)


def test_split_order_is_kept_and_line_ends_do_not_matter(voc):
    (voc / "ImageSets/Segmentation/odd.txt").write_bytes(b"\xef\xbb\xbfc\r\n\r\na\r\nb")
    assert read_split(voc, "odd") == ["c", "a", "b"]


# --- pairs ---------------------------------------------------------------------------------------


def test_all_missing_files_are_counted_before_training(voc):
    for name in "abcdefg":
        (voc / "SegmentationClass" / f"{name}.png").unlink()
    (voc / "JPEGImages/h.jpg").unlink()
    with pytest.raises(DataError) as caught:
        VOCDataset(voc, "train")
    text = str(caught.value)
    assert "1 of 8 images are missing" in text
    assert str(voc / "JPEGImages/h.jpg") in text
    assert "7 of 8 masks are missing" in text
    assert str(voc / "SegmentationClass/e.png") in text
    assert "and 2 more" in text
    assert "f.png" not in text


@pytest.mark.parametrize("kind", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_a_file_lost_after_the_check_is_named(voc, kind):
    dataset = VOCDataset(voc, "train")
    (voc / kind).unlink()
    with pytest.raises(DataError, match="no such file") as caught:
        dataset.sample(1)
    assert str(voc / kind) in str(caught.value)


def test_a_mask_of_another_size_is_refused(voc):
    data.save_indexed_png(voc / "SegmentationClass/b.png", np.zeros((30, 20), np.uint8))
    with pytest.raises(DataError, match="30 x 20") as caught:
        VOCDataset(voc, "train").sample(1)
    text = str(caught.value)
    assert "20 x 30" in text
    assert str(voc / "SegmentationClass/b.png") in text


def test_png_images_are_taken_too(voc):
    (voc / "JPEGImages/b.jpg").unlink()
    (voc / "JPEGImages/b.png").write_bytes(encoded(noise(), "PNG"))
    np.testing.assert_array_equal(VOCDataset(voc, "train").sample(1)[0], noise())


# --- masks ---------------------------------------------------------------------------------------


def test_a_wrong_label_is_named_with_count_and_place(voc):
    mask = np.zeros((20, 30), np.uint8)
    mask[7, 5] = mask[9, 1:3] = 77
    path = voc / "SegmentationClass/b.png"
    data.save_indexed_png(path, mask)
    with pytest.raises(DataError) as caught:
        VOCDataset(voc, "train").sample(1)
    text = str(caught.value)
    for part in (str(path), "label 77 in 3 pixels", "row 7, column 5", "0..20", "255"):
        assert part in text


@pytest.mark.parametrize("label", [21, 254])
def test_labels_just_outside_are_refused_and_just_inside_are_not(tmp_path, label):
    data.save_indexed_png(tmp_path / "m.png", np.array([[20, label, 255]], np.uint8))
    with pytest.raises(DataError, match=f"label {label} in 1 pixels"):
        read_mask(tmp_path / "m.png", 21)
    data.save_indexed_png(tmp_path / "m.png", np.array([[20, 0, 255]], np.uint8))
    assert read_mask(tmp_path / "m.png", 21).tolist() == [[20, 0, 255]]


def test_grey_masks_are_read_as_numbers_whatever_their_depth(tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(encoded(np.array([[0, 3, 255, 20]], np.uint8), "PNG"))
    assert read_mask(path, 21).tolist() == [[0, 3, 255, 20]]
    path.write_bytes(png(4, 1, 4, 0, bytes([0, 0x01, 0x2F])))
    assert read_mask(path, 21).tolist() == [[0, 1, 2, 15]]
    path.write_bytes(png(4, 1, 2, 0, bytes([0, 0b00011011])))
    assert read_mask(path, 21).tolist() == [[0, 1, 2, 3]]
    path.write_bytes(png(8, 1, 1, 0, bytes([0, 0b01000001])))
    assert read_mask(path, 21).tolist() == [[0, 1, 0, 0, 0, 0, 0, 1]]


def test_one_flipped_bit_does_not_pass_as_other_labels(tmp_path):
    path = tmp_path / "m.png"
    mask = data.draw_sample((96, 128), sample_rng(0, 0, 0))[1]  # large even regions, as in real masks
    data.save_indexed_png(path, mask)
    content = path.read_bytes()
    refused = 0
    for position in range(content.index(b"IDAT"), len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            np.testing.assert_array_equal(read_mask(path, 6), mask)
        except DataError:
            refused += 1
    assert refused > 0.9 * (len(content) - content.index(b"IDAT"))


def test_masks_of_few_colours_and_any_palette_keep_their_indices(tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(png(4, 1, 4, 3, bytes([0, 0x01, 0x2F]), palette=bytes(range(48))[::-1]))
    assert read_mask(path, 21).tolist() == [[0, 1, 2, 15]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_coded_mask_is_refused_with_the_reason(tmp_path, mode):
    path = tmp_path / "m.png"
    path.write_bytes(encoded(data.colourise(np.ones((4, 4), np.uint8)), "PNG", mode))
    with pytest.raises(DataError, match="colour-coded") as caught:
        read_mask(path, 21)
    assert str(path) in str(caught.value)
    assert "palette indices" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        encoded(np.zeros((4, 4), np.uint16), "PNG"),
        encoded(np.zeros((4, 4), np.uint8), "PNG", "LA"),
        encoded(np.zeros((4, 4), np.uint8), "JPEG"),
        encoded(np.zeros((4, 4), np.uint8), "TIFF"),
    ],
    ids=["16 bit", "alpha", "JPEG", "TIFF"],
)
def test_other_pictures_are_no_masks(tmp_path, content):
    path = tmp_path / "m.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"m\.png"):
        read_mask(path, 21)


# --- images --------------------------------------------------------------------------------------


def test_images_of_every_mode_become_rgb(tmp_path):
    rgb = np.array(Image.fromarray(noise()).convert("P").convert("RGB"))  # colours that a palette holds
    grey = np.array(Image.fromarray(rgb).convert("L"))
    path = tmp_path / "i.png"
    path.write_bytes(encoded(rgb, "PNG", "P"))
    np.testing.assert_array_equal(read_image(path), rgb)
    path.write_bytes(encoded(rgb, "PNG", "RGBA"))
    np.testing.assert_array_equal(read_image(path), rgb)
    path.write_bytes(encoded(grey, "PNG"))
    np.testing.assert_array_equal(read_image(path), np.dstack([grey] * 3))
    path.write_bytes(encoded(grey.astype(np.uint16) * 256 + 7, "PNG"))
    np.testing.assert_array_equal(read_image(path), np.dstack([grey] * 3))
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    path.write_bytes(encoded(flat, "JPEG", "CMYK", quality=100))
    assert np.abs(read_image(path).astype(int) - flat).max() <= 3


def test_only_prediction_turns_by_exif_and_reads_more_formats(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "i.jpg"
    path.write_bytes(encoded(noise(20, 30), "JPEG", exif=exif))
    assert read_image(path).shape == (20, 30, 3)
    upright = read_image(path, for_prediction=True)
    np.testing.assert_array_equal(upright, np.rot90(read_image(path), -1))
    for file_format in ("BMP", "WEBP"):
        path.write_bytes(encoded(noise(), file_format))
        assert read_image(path, for_prediction=True).shape == (20, 30, 3)
        with pytest.raises(DataError, match=r"i\.jpg"):
            read_image(path)
    path.write_bytes(encoded(noise(), "TIFF"))
    with pytest.raises(DataError, match=r"i\.jpg.*JPEG or PNG or BMP or WEBP"):
        read_image(path, for_prediction=True)


JPEG = encoded(noise(60, 80), "JPEG")
PNG = encoded(noise(60, 80), "PNG")
MASK = encoded(np.random.default_rng(0).integers(0, 21, (60, 80)).astype(np.uint8), "PNG")
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


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures_are_named(tmp_path, name):
    path = tmp_path / "broken.jpg"
    path.write_bytes(DAMAGED[name])
    for read in (read_image, lambda file: read_mask(file, 21)):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_reasons_are_told_apart(tmp_path):
    path = tmp_path / "broken.jpg"
    for name, reason in (
        ("empty", "0 bytes"),
        ("truncated JPEG", "cut off"),
        ("text", "html"),
        ("bomb", "64,000,000"),
        ("just too large", "64,000,000"),
    ):
        path.write_bytes(DAMAGED[name])
        with pytest.raises(DataError, match=reason):
            read_image(path)


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(DataError, match=r"x\.jpg"):
        read_image(tmp_path / "x.jpg")


def test_mutated_files_either_read_or_raise_data_error(tmp_path):
    rng = np.random.default_rng(3)
    path = tmp_path / "mutant"
    messages = []
    for number in range(600):
        original = (JPEG, PNG, MASK)[number % 3]
        content = bytearray(original)
        for position in rng.integers(0, len(content) if number % 2 else 200, rng.integers(1, 4)):
            content[position] ^= int(rng.integers(1, 256))
        if number % 5 == 0:
            del content[int(rng.integers(1, len(content))) :]
        path.write_bytes(content)
        try:
            if original is MASK:
                np.testing.assert_array_equal(read_mask(path, 21), np.array(Image.open(io.BytesIO(MASK))))
            else:
                assert read_image(path).shape[2] == 3
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 400
    assert all(str(path) in message for message in messages)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files through /proc")
def test_damaged_files_do_not_stay_open(tmp_path):
    path = tmp_path / "broken.jpg"
    kept = []  # an exception kept alive keeps its frames, and with them whatever they still hold open
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in DAMAGED:
        path.write_bytes(DAMAGED[name])
        with pytest.raises(DataError) as caught:
            read_image(path)
        kept.append(caught)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- transforms ----------------------------------------------------------------------------------


def denormalised(pixels: np.ndarray) -> np.ndarray:
    return (pixels * data.IMAGENET_STD + data.IMAGENET_MEAN) * 255


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red is the row and whose green is the column, and a mask computed from both."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    return image, place_label(rows, columns)


def place_label(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return ((rows * 7 + columns * 3) % 200).astype(np.uint8)


def test_normalise_is_the_published_formula():
    image = np.array([[[0, 128, 255], [255, 0, 1]]], np.uint8)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    result = normalise(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "kind"), [(1.0, "same"), (1.5, "crop"), (0.5, "padding")])
def test_image_and_mask_move_together(scale, kind):
    size = (64, 96)
    image, mask = coordinates(round(64 * scale), round(96 * scale))  # resizing is then the identity
    transform = TrainTransform(size, scale=(scale, scale))
    tops, lefts, flips = [], [], set()
    for index in range(40):
        pixels, labels = transform(image, mask, sample_rng(0, 0, index))
        assert (pixels.shape, pixels.dtype) == ((64, 96, 3), np.float32)
        assert (labels.shape, labels.dtype) == ((64, 96), np.uint8)
        inside = labels != VOID
        assert inside.sum() == min(image.shape[0], 64) * min(image.shape[1], 96)
        np.testing.assert_array_equal(pixels[~inside], 0)
        back = denormalised(pixels)[inside]
        np.testing.assert_allclose(back, np.round(back), atol=1e-3)
        rows, columns = (np.round(back[:, channel]).astype(int) for channel in (0, 1))
        np.testing.assert_array_equal(labels[inside], place_label(rows, columns))
        flips.add(bool(columns[0] > columns[1]))
        tops.append(rows.min() + inside.argmax() // 96)
        lefts.append(columns.min() + inside.argmax() % 96)
    assert flips == {True, False}
    if kind != "same":
        assert len(set(tops)) > 10
        assert len(set(lefts)) > 10
        assert np.abs(np.corrcoef(tops, lefts)[0, 1]) < 0.5


@pytest.mark.parametrize(("source", "target"), [(5, 4), (4, 5)])
def test_every_place_of_a_crop_is_reached(source, target):
    image, mask = coordinates(source, source)
    transform = TrainTransform((target, target), scale=(source / target, source / target), flip=False)
    results = {transform(image, mask, sample_rng(0, 0, index))[1].tobytes() for index in range(60)}
    assert len(results) == 4, "two tops times two lefts"


def test_image_and_mask_stay_aligned_when_scaled():
    rows, columns = np.mgrid[0:75, 0:100]
    image = np.stack([rows * 3, columns * 2, rows * 0], axis=2).astype(np.uint8)
    mask = (rows // 15 * 10 + columns // 10).astype(np.uint8)  # bands of 15 rows and 10 columns
    transform = TrainTransform((60, 80), scale=(0.5, 2.0))
    for index in range(40):
        pixels, labels = transform(image, mask, sample_rng(1, 0, index))
        inside = labels != VOID
        back = denormalised(pixels)[inside]
        label = labels[inside].astype(int)
        # The colour tells the source pixel to about one pixel; it must lie in the label's band.
        assert np.abs(back[:, 0] / 3 - (label // 10 * 15 + 7)).max() < 8.6
        assert np.abs(back[:, 1] / 2 - (label % 10 * 10 + 4.5)).max() < 6.1


def test_masks_are_never_interpolated():
    mask = np.random.default_rng(0).choice(np.array([0, 20, 255], np.uint8), (37, 53))
    image = noise(37, 53)
    for index in range(30):
        _, labels = TrainTransform((40, 40), scale=(0.3, 3.0))(image, mask, sample_rng(0, 0, index))
        assert set(np.unique(labels)) <= {0, 20, 255}
    for size in ((5, 7), (37, 53), (111, 90)):
        assert set(np.unique(resize_mask(mask, size))) <= {0, 20, 255}


def test_resizing_takes_height_first_and_antialiases():
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, ::2] = 200
    small = resize_image(stripes, (10, 20))
    assert small.shape == (10, 20, 3)
    assert np.abs(small.astype(int) - 100).max() <= 15, "aliased stripes would be 0 or 200"
    assert resize_mask(stripes[:, :, 0], (10, 20)).shape == (10, 20)


def test_eval_transform_is_plain_resizing():
    image, mask = noise(), np.random.default_rng(0).integers(0, 21, (20, 30)).astype(np.uint8)
    pixels, labels = EvalTransform((10, 12))(image, mask, sample_rng(0, 0, 0))
    np.testing.assert_array_equal(pixels, normalise(resize_image(image, (10, 12))))
    np.testing.assert_array_equal(labels, resize_mask(mask, (10, 12)))


def test_flip_off_changes_nothing_else():
    image, mask = coordinates(64, 96)
    for index in range(10):
        with_flip = TrainTransform((32, 48), (0.8, 1.2))(image, mask, sample_rng(0, 0, index))[1]
        without = TrainTransform((32, 48), (0.8, 1.2), flip=False)(image, mask, sample_rng(0, 0, index))[1]
        assert with_flip.shape == without.shape
        assert (with_flip == VOID).sum() == (without == VOID).sum()


def test_transforms_do_not_change_their_input():
    image, mask = coordinates(64, 96)
    copies = image.copy(), mask.copy()
    TrainTransform((32, 48))(image, mask, sample_rng(0, 0, 0))
    EvalTransform((64, 96))(image, mask, sample_rng(0, 0, 0))[1][:] = 0
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(mask, copies[1])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: TrainTransform((0, 5)), DataError),
        (lambda: TrainTransform((5, 5), scale=(2, 1)), DataError),
        (lambda: TrainTransform((5, 5), scale=(0, 1)), DataError),
        (lambda: TrainTransform((5, 5), scale=(float("nan"), 1)), DataError),
        (lambda: EvalTransform((5,)), DataError),
        (lambda: normalise(np.zeros((4, 4, 3), np.float32)), DTypeError),
        (lambda: normalise(np.zeros((4, 4), np.uint8)), ShapeError),
        (lambda: resize_image(np.zeros((4, 4, 4), np.uint8), (2, 2)), ShapeError),
        (lambda: resize_mask(np.zeros((4, 4), np.int64), (2, 2)), DTypeError),
        (lambda: resize_mask(np.zeros((4, 4, 3), np.uint8), (2, 2)), ShapeError),
        (lambda: resize_mask(np.zeros((4, 4), np.uint8), (2, 0)), DataError),
        (
            lambda: EvalTransform((4, 4))(noise(4, 5), np.zeros((5, 4), np.uint8), sample_rng(0, 0, 0)),
            ShapeError,
        ),
    ],
)
def test_wrong_arguments_of_transforms_are_refused(call, error):
    with pytest.raises(error):
        call()


# --- loader --------------------------------------------------------------------------------------


class SlowPictures:
    """Samples from memory that take unequal times, so that threads finish out of order; counts its calls."""

    def __init__(self, count: int, damaged: int | None = None) -> None:
        self.count = count
        self.damaged = damaged
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        self.asked.append(index)
        time.sleep(0.001 * (index * 7 % 4))
        if index == self.damaged:
            raise DataError(f"picture{index}.jpg: damaged")
        mask = np.full((12, 16), index % 256, np.uint8)
        return noise(12, 16, seed=index), mask, f"picture{index}"


def batches_of(loader: Loader, epoch: int, start_batch: int = 0) -> list[tuple]:
    return [(batch.ids, batch.images.tobytes(), batch.labels.tobytes()) for batch in loader.epoch(epoch, start_batch)]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("segnet-data")]


def test_batches_hold_the_transformed_samples():
    source = SlowPictures(11)
    transform = TrainTransform((10, 10))
    loader = Loader(source, transform, batch=4, seed=5)
    assert loader.batches_per_epoch == 3
    batches = list(loader.epoch(2))
    assert [batch.images.shape for batch in batches] == [(4, 10, 10, 3), (4, 10, 10, 3), (3, 10, 10, 3)]
    assert [batch.labels.shape for batch in batches] == [(4, 10, 10), (4, 10, 10), (3, 10, 10)]
    assert batches[0].images.dtype == np.float32
    assert batches[0].images.flags.c_contiguous
    order = epoch_order(11, 5, 2, shuffle=True).tolist()
    assert [name for batch in batches for name in batch.ids] == [f"picture{index}" for index in order]
    position = 0
    for batch in batches:
        for pixels, labels in zip(batch.images, batch.labels, strict=True):
            index = order[position]
            image, mask, _ = source.sample(index)
            expected = transform(image, mask, sample_rng(5, 2, index))
            np.testing.assert_array_equal(pixels, expected[0])
            np.testing.assert_array_equal(labels, expected[1])
            position += 1


def test_workers_and_prefetch_do_not_change_the_stream():
    reference = batches_of(Loader(SlowPictures(23), TrainTransform((10, 10)), 4, seed=1, workers=0), 3)
    for workers, prefetch in ((1, 1), (2, 2), (7, 1), (3, 9)):
        loader = Loader(SlowPictures(23), TrainTransform((10, 10)), 4, seed=1, workers=workers, prefetch=prefetch)
        assert batches_of(loader, 3) == reference


def test_seed_and_epoch_change_order_and_crops():
    loader = Loader(SlowPictures(12), TrainTransform((10, 10)), 4, seed=1)
    other = Loader(SlowPictures(12), TrainTransform((10, 10)), 4, seed=2)
    assert batches_of(loader, 0) == batches_of(loader, 0)
    assert batches_of(loader, 0) != batches_of(loader, 1)
    assert batches_of(loader, 0) != batches_of(other, 0)


def test_streams_of_samples_differ_in_every_number():
    first = {
        (seed, epoch, index): sample_rng(seed, epoch, index).random()
        for seed in range(4)
        for epoch in range(4)
        for index in range(4)
    }
    assert len(set(first.values())) == 64
    assert sample_rng(1, 2, 3).random() == first[1, 2, 3]


def test_order_is_a_permutation_and_plain_without_shuffle():
    order = epoch_order(50, 0, 0, shuffle=True)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))
    assert order.tolist() != epoch_order(50, 0, 1, shuffle=True).tolist()
    assert epoch_order(5, 0, 3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("drop_last", [False, True])
def test_resuming_gives_the_tail_without_decoding_the_head(drop_last):
    def new_loader() -> Loader:
        return Loader(SlowPictures(14), TrainTransform((10, 10)), 4, seed=3, drop_last=drop_last)

    whole = batches_of(new_loader(), 1)
    assert len(whole) == new_loader().batches_per_epoch == (3 if drop_last else 4)
    for start in range(len(whole) + 1):
        loader = new_loader()
        assert batches_of(loader, 1, start) == whole[start:]
        tail = epoch_order(14, 3, 1, shuffle=True)[start * 4 : 12 if drop_last else 14]
        assert sorted(loader.dataset.asked) == sorted(tail.tolist())


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_damaged_sample_is_reported_when_its_batch_is_due(workers):
    loader = Loader(SlowPictures(16, damaged=9), EvalTransform((8, 8)), 4, shuffle=False, workers=workers, prefetch=3)
    stream = loader.epoch(0)
    assert [next(stream).ids[0], next(stream).ids[0]] == ["picture0", "picture4"]
    with pytest.raises(DataError, match=r"picture9\.jpg"):
        next(stream)
    assert not loader_threads()


def test_a_damaged_file_reaches_the_consumer(voc):
    (voc / "JPEGImages/f.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        list(Loader(VOCDataset(voc, "train"), TrainTransform((10, 10)), 3).epoch(0))
    assert str(voc / "JPEGImages/f.jpg") in str(caught.value)


def test_closing_early_stops_the_threads():
    loader = Loader(SlowPictures(1000), EvalTransform((8, 8)), 4, workers=3, prefetch=200)
    stream = loader.epoch(0)
    next(stream)
    assert loader_threads()
    stream.close()
    assert not loader_threads()
    assert len(loader.dataset.asked) < 600, "what was queued and not begun is dropped"


def test_batches_are_prepared_ahead():
    loader = Loader(SlowPictures(40), EvalTransform((8, 8)), 4, workers=2, prefetch=3)
    stream = loader.epoch(0)
    next(stream)
    deadline = time.perf_counter() + 5
    while len(loader.dataset.asked) < 4 + 3 * 4 and time.perf_counter() < deadline:
        time.sleep(0.005)
    assert len(loader.dataset.asked) == 4 + 3 * 4
    stream.close()


def test_waiting_is_measured():
    class Sleepy(SlowPictures):
        def sample(self, index):
            time.sleep(0.02)
            return super().sample(index)

    loader = Loader(Sleepy(8), EvalTransform((8, 8)), 2, workers=1)
    assert loader.waited == 0
    list(loader.epoch(0))
    assert loader.waited >= 0.1
    before = loader.waited
    for _ in loader.epoch(1):
        time.sleep(0.1)  # a consumer that is slower than the loader hardly waits
    assert loader.waited - before < 0.35


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_map_keeps_order(workers):
    assert list(ordered_map(lambda n: n * n, range(20), workers, ahead=3)) == [n * n for n in range(20)]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"batch": 0}, "batch 0"),
        ({"batch": 2, "seed": -1}, "seed -1"),
        ({"batch": 2, "workers": -1}, "workers -1"),
        ({"batch": 2, "prefetch": 0}, "prefetch 0"),
        ({"batch": 9, "drop_last": True}, "8 samples"),
    ],
)
def test_wrong_arguments_of_the_loader_are_refused(options, hint):
    with pytest.raises(DataError, match=hint):
        Loader(SlowPictures(8), EvalTransform((8, 8)), **options)


def test_an_empty_set_and_epochs_that_do_not_exist_are_refused():
    with pytest.raises(DataError, match="no samples"):
        Loader(SlowPictures(0), EvalTransform((8, 8)), 2)
    loader = Loader(SlowPictures(8), EvalTransform((8, 8)), 2)
    for epoch, start_batch in ((-1, 0), (0, -1), (0, 5)):
        with pytest.raises(DataError, match=str(min(epoch, start_batch) if start_batch != 5 else 5)):
            loader.epoch(epoch, start_batch)


# --- synthetic sample ----------------------------------------------------------------------------


def digest(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_sample_is_deterministic_and_readable(tmp_path):
    first = write_sample(tmp_path / "one", train=6, val=3)
    second = write_sample(tmp_path / "two", train=6, val=3)
    other = write_sample(tmp_path / "other", train=6, val=3, seed=1)
    assert digest(first) == digest(second)
    pictures = [name for name in digest(first) if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 18
    assert len({digest(root)[name] for root in (first, other) for name in pictures}) == 36
    for split, count in (("train", 6), ("val", 3), ("trainval", 9)):
        dataset = VOCDataset(first, split)
        assert len(dataset) == count
        assert dataset.names == SAMPLE_CLASSES
        for index in range(count):
            image, mask, _ = dataset.sample(index)
            assert image.shape == (96, 128, 3)
            assert VOID in mask
    assert not set(VOCDataset(first, "train").ids) & set(VOCDataset(first, "val").ids)


def test_every_class_occurs_in_most_images():
    masks = [data.draw_sample((96, 128), sample_rng(0, 0, index))[1] for index in range(40)]
    for label in range(len(SAMPLE_CLASSES)):
        assert np.mean([(mask == label).sum() >= 20 for mask in masks]) > 0.7, SAMPLE_CLASSES[label]


def test_void_runs_between_all_regions():
    _, mask = data.draw_sample((96, 128), sample_rng(0, 0, 0))
    for first, second in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        border = (first != second) & (first != VOID) & (second != VOID)
        assert not border.any()
    assert 0.02 < (mask == VOID).mean() < 0.2


def test_running_again_is_harmless(tmp_path):
    root = write_sample(tmp_path / "s", train=3, val=2)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_sample(tmp_path / "s", train=3, val=2)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_foreign_folder_is_left_alone(voc, tmp_path):
    before = digest(voc)
    with pytest.raises(DataError, match="set: holds something else"):
        write_sample(voc, train=3, val=2)
    assert digest(voc) == before
    root = write_sample(tmp_path / "s", train=3, val=2)
    with pytest.raises(DataError, match=r"another sample"):
        write_sample(root, train=3, val=2, seed=9)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file"):
        write_sample(tmp_path / "file")


def test_an_interrupted_write_is_no_data_set_and_can_be_completed(tmp_path, monkeypatch):
    whole = write_sample(tmp_path / "whole", train=4, val=2)
    written = []

    def interrupted(path: Path, labels: np.ndarray) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        data.save_indexed_png(path, labels)

    monkeypatch.setattr("segnet_scratch.data.sample.save_indexed_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "cut", train=4, val=2)
    with pytest.raises(DataError, match="no split 'train'"):
        VOCDataset(tmp_path / "cut", "train")
    monkeypatch.undo()
    assert digest(write_sample(tmp_path / "cut", train=4, val=2)) == digest(whole)


@pytest.mark.parametrize("options", [{"train": 0}, {"val": 0}, {"seed": -1}, {"size": (20, 128)}, {"size": (96, 9999)}])
def test_wrong_settings_of_the_sample_are_refused(tmp_path, options):
    with pytest.raises(SegnetError, match="expected"):
        write_sample(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
