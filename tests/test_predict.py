"""Prediction: label maps, overlays and logits at the size of the image, for every kind of picture a user has."""

import errno
import os
import struct
from functools import partial

import numpy as np
import pytest
from PIL import Image
from support import raises
from support.evaluation import network, segment

from segnet_scratch import SegNetBasic
from segnet_scratch.data import drawing, normalise, resize_image
from segnet_scratch.data.drawing import Style, heat_colours, heat_map
from segnet_scratch.data.palette import class_palette
from segnet_scratch.errors import DataError
from segnet_scratch.inference import Inference, Segmenter
from segnet_scratch.predict import find_images, predict_files

NAMES = ("background", "circle", "square", "triangle", "star", "ring")
SIZE = (32, 48)


@pytest.fixture(scope="module")
def model():
    model = SegNetBasic(6, 1 / 8, "numpy", seed=3)
    model(np.random.default_rng(0).standard_normal((4, 32, 48, 3)).astype(np.float32))  # running statistics
    return model.eval()


def noise(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def run(model, paths, out, with_logits=True, names=NAMES):
    return list(predict_files(Segmenter(model, SIZE), paths, out, Style(names), with_logits))


def test_the_three_files_of_an_image(model, tmp_path):
    path = save(tmp_path / "photo.jpg", noise(50, 70))
    (done,) = run(model, [path], tmp_path / "new" / "out")
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
        *("photo.npy", "photo.png", "photo_overlay.png")
    ]
    assert done.image == path
    assert {kind: file.name for kind, file in done.files.items()} == {
        "labels": "photo.png",
        "overlay": "photo_overlay.png",
        "logits": "photo.npy",
    }

    labels = Image.open(done.files["labels"])
    assert (labels.format, labels.mode, labels.size) == ("PNG", "P", (70, 50))
    np.testing.assert_array_equal(np.array(labels.getpalette()).reshape(-1, 3), class_palette(NAMES))
    assert labels.getpalette()[:3] == [0, 0, 0]
    assert labels.getpalette()[-3:] == [224, 224, 192]  # VOC's void

    logits = np.load(done.files["logits"])
    assert logits.shape == (50, 70, 6)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits.argmax(axis=2), np.array(labels))
    assert len(np.unique(labels)) > 1  # else the line above says little

    counts = np.bincount(np.array(labels).reshape(-1), minlength=6)
    assert done.shares == {NAMES[k]: counts[k] / 3500 for k in range(6) if counts[k]}
    assert list(done.shares.values()) == sorted(done.shares.values(), reverse=True)


def test_logits_are_those_of_the_model_resized(model, tmp_path):
    image = noise(*SIZE)
    found = segment(model, image, SIZE, with_logits=True)
    labels, logits = found.labels, found.logits
    np.testing.assert_array_equal(logits, model(normalise(image)[None]).numpy()[0])
    np.testing.assert_array_equal(labels, logits.argmax(axis=2))
    smaller = resize_image(image, (20, 30))
    assert segment(model, smaller, SIZE).labels.shape == (20, 30)
    assert segment(model, smaller, SIZE).logits is None


def test_logits_are_written_only_where_asked(model, tmp_path):
    (done,) = run(model, [save(tmp_path / "a.png", noise(40, 40))], tmp_path / "out", with_logits=False)
    assert "logits" not in done.files
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "a_overlay.png"]


@pytest.mark.parametrize(
    ("height", "width"),
    [(33, 47), (1, 1), (3, 2), (2, 900), (900, 2), (200, 301)],
    ids=["odd", "one pixel", "tiny", "wide", "tall", "larger than the network's input"],
)
def test_every_size(model, tmp_path, height, width):
    (done,) = run(model, [save(tmp_path / "a.png", noise(height, width))], tmp_path / "out")
    labels = np.array(Image.open(done.files["labels"]))
    assert labels.shape == (height, width)
    assert np.load(done.files["logits"]).shape == (height, width, 6)
    np.testing.assert_array_equal(np.load(done.files["logits"]).argmax(axis=2), labels)
    picture = Image.open(done.files["overlay"])
    assert picture.mode == "RGB"
    assert picture.height > height
    assert picture.width >= width


def labels_of(model, path, out):
    (done,) = run(model, [path], out)
    return np.array(Image.open(done.files["labels"]))


def test_a_rotated_photo_is_turned_upright(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    save(tmp_path / "a.png", noise(40, 60), exif=exif)
    upright = np.rot90(noise(40, 60), -1)
    found = labels_of(model, tmp_path / "a.png", tmp_path / "out")
    np.testing.assert_array_equal(found, segment(model, np.ascontiguousarray(upright), SIZE).labels)
    assert found.shape == (60, 40)
    save(tmp_path / "b.jpg", noise(40, 60), exif=exif)
    assert labels_of(model, tmp_path / "b.jpg", tmp_path / "out").shape == (60, 40)


# Overlays


def test_an_overlay_shows_image_colours_and_legend():
    image, labels = np.full((60, 200, 3), 100, np.uint8), np.zeros((60, 200), np.uint8)
    labels[:, 100:] = 1
    image[:, :, 0] = 160
    picture = np.array(Style(NAMES).overlay(image, labels))
    assert picture.shape[1] == 200
    assert picture.shape[0] > 60
    np.testing.assert_array_equal(picture[:60, :100], image[:, :100])  # the background as it is
    grey, colour = 120, class_palette(NAMES)[1].astype(float)
    np.testing.assert_allclose(picture[30, 150], 0.45 * grey + 0.55 * colour, atol=1)
    legend = picture[60:].reshape(-1, 3).tolist()
    assert [255, 255, 255] in legend
    assert class_palette(NAMES)[1].tolist() in legend  # the square of class 1
    assert [0, 0, 0] in legend  # text, and the square of the background


def test_only_a_background_is_left_uncoloured_and_the_opacity_is_the_one_asked_for():
    image, labels = noise(30, 40), np.zeros((30, 40), np.uint8)
    np.testing.assert_array_equal(Style(NAMES).blend(image, labels), image)
    np.testing.assert_array_equal(Style(["Background", "x"]).blend(image, labels), image)
    grey, sky = image.mean(axis=2, keepdims=True), np.array([10, 200, 90])
    for opacity in (0, 0.25, 1):
        mixed = Style(["sky", "road"], [sky, (1, 2, 3)], opacity).blend(image, labels)
        np.testing.assert_allclose(mixed, (1 - opacity) * (grey if opacity else image) + opacity * sky, atol=1)


def test_a_large_overlay_is_mixed_in_blocks_of_rows(monkeypatch):
    image, labels = noise(50, 40), np.random.default_rng(0).integers(0, 6, (50, 40)).astype(np.uint8)
    whole = Style(NAMES).blend(image, labels)
    monkeypatch.setattr(drawing, "row_blocks", partial(drawing.row_blocks, pixels=130))
    np.testing.assert_array_equal(Style(NAMES).blend(image, labels), whole)


def test_the_legend_names_the_classes_that_occur():
    # Every class costs ink: with one more class there is more of it, and an absent class changes nothing.
    def ink(labels, names=NAMES):
        return (np.array(Style(names).overlay(np.zeros((40, 300, 3), np.uint8), labels))[40:] < 128).sum()

    none, some = np.zeros((40, 300), np.uint8), np.zeros((40, 300), np.uint8)
    some[:, :9] = 4
    assert ink(some) > ink(none) > 0
    assert ink(some, [*NAMES[:5], "another name"]) == ink(some)
    assert ink(some, [*NAMES[:4], "stellated polyhedron", "ring"]) > ink(some)


def test_a_legend_is_readable_below_a_narrow_image():
    image, labels = np.zeros((50, 4, 3), np.uint8), np.zeros((50, 4), np.uint8)
    labels[:25] = np.arange(1, 6).repeat(5)[:, None]
    picture = Style(NAMES).overlay(image, labels)
    wide = Style(NAMES).overlay(np.zeros((50, 600, 3), np.uint8), labels.repeat(150, axis=1))
    assert 60 < picture.width < 200  # as wide as its longest name
    assert picture.height > wide.height  # one class a row, where a wide image has them beside each other
    ink = [(np.array(p)[50:].min(axis=2) < 128).sum() for p in (picture, wide)]
    assert ink[0] == ink[1]


def test_brackets_in_class_names_are_drawn(model, tmp_path):
    (done,) = run(model, [save(tmp_path / "a.png", noise(40, 60))], tmp_path / "out", names=[f"[{n}]" for n in NAMES])
    assert all(name.startswith("[") for name in done.shares)


# What a user names


def test_files_folders_and_patterns_are_found(tmp_path, monkeypatch):
    for name in ("b.JPG", "a.png", "c.webp", "notes.txt", ".hidden.txt", "brackets[1].png"):
        (tmp_path / name).touch()
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "sub.png" / "d.bmp").touch()

    def found(*arguments):
        return [path.relative_to(tmp_path).as_posix() for path in find_images([str(tmp_path / a) for a in arguments])]

    assert found(".") == ["a.png", "b.JPG", "brackets[1].png", "c.webp"]
    assert found("sub.png") == ["sub.png/d.bmp"]
    assert found("*.png") == ["a.png", "brackets[1].png"]  # sub.png is a folder
    assert found("**/*.bmp") == ["sub.png/d.bmp"]
    assert found("brackets[1].png") == ["brackets[1].png"]  # a name, not a pattern
    assert found("[ac].*", "notes.txt") == ["a.png", "c.webp", "notes.txt"]
    assert found("c.webp", "*.webp", ".") == ["c.webp", "a.png", "b.JPG", "brackets[1].png"]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in find_images(["*.JPG"])] == ["b.JPG"]


def test_what_is_not_there_is_explained(tmp_path):
    (tmp_path / "movies").mkdir()
    (tmp_path / "movies" / "a.mp4").touch()
    with pytest.raises(DataError, match=r"movies: no images in this folder; expected files that end in \.jpg"):
        find_images([str(tmp_path / "movies")])
    with pytest.raises(DataError, match=r"none\.jpg: no such file; check the path"):
        find_images([str(tmp_path / "none.jpg")])
    with pytest.raises(DataError, match=r"\*\.jpg: no such file, and as a pattern it matches none"):
        find_images([str(tmp_path / "*.jpg")])


# Uncertainty


def test_samples_write_an_uncertainty_map(tmp_path):
    bayesian = network(dropout=True)
    image = noise(50, 70)
    path = save(tmp_path / "a.png", image)
    inference = Inference(samples=3)
    segmenter = Segmenter(bayesian, SIZE, inference)
    (done,) = predict_files(segmenter, [path], tmp_path / "out", Style(NAMES), True)
    expected = segment(bayesian, image, SIZE, inference, True)
    np.testing.assert_array_equal(np.load(done.files["uncertainty_array"]), expected.uncertainty)
    np.testing.assert_array_equal(np.load(done.files["logits"]), expected.logits)
    np.testing.assert_array_equal(np.array(Image.open(done.files["labels"])), expected.labels)
    picture = np.array(Image.open(done.files["uncertainty"]))
    largest = np.unravel_index(expected.uncertainty.argmax(), expected.uncertainty.shape)
    assert picture[largest].tolist() == [252, 255, 190]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("a.npy", "a.png", "a_overlay.png", "a_uncertainty.npy", "a_uncertainty.png")
    ]
    (done,) = predict_files(segmenter, [path], tmp_path / "other", Style(NAMES))
    assert sorted(done.files) == ["labels", "overlay", "uncertainty"]


def test_a_heat_map_shows_values_above_a_bar(tmp_path):
    values = np.zeros((40, 300), np.float32)
    values[:, 100:200], values[:, 200:] = 0.05, 0.1
    picture = np.array(heat_map(values, "variance"))
    assert picture.shape[1] == 300
    assert picture[20, [50, 150, 250]].tolist() == heat_colours(np.array([0, 0.5, 1])).tolist()
    bar = picture[40 + 9].astype(int)
    for colour in heat_colours(np.linspace(0, 1, 9)):
        assert np.abs(bar - colour).sum(axis=1).min() < 15
    names = [np.array(heat_map(values, what))[40:, :20] for what in ("variance", "deviance")]
    assert not np.array_equal(*names)  # the name is written

    def end(scale):
        return np.array(heat_map(scale * values, "v"))[40:, -30:]

    assert not np.array_equal(end(1), end(2))  # the largest value is written
    assert np.array_equal(np.array(heat_map(values, "v"))[:40], np.array(heat_map(2 * values, "v"))[:40])


def test_a_heat_map_of_nothing_is_black():
    assert (np.array(heat_map(np.zeros((30, 200)), "v"))[:30] == [0, 0, 4]).all()


def test_heat_grows_brighter():
    colours = heat_colours(np.linspace(0, 1, 256)).astype(float)
    light = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(light) >= 0).all()
    assert light[-1] - light[0] > 200


# Errors


def left(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_missing_image_is_named_before_anything_is_written(model, tmp_path):
    paths = [save(tmp_path / "a.png", noise(40, 40)), tmp_path / "b.jpg", tmp_path / "c.jpg"]
    with pytest.raises(DataError, match=r"b\.jpg: no such file.* 1 more of 3"):
        run(model, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_image(model, tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        run(model, [tmp_path], tmp_path / "out")


NAMESAKES = {
    "another format": (("gray.jpg", "gray.png", "x.png"), ("gray.jpg", "gray.png", "x")),
    "another case": (("Gray.jpg", "gray.png"), ("Gray.jpg", "gray.png")),
    "another form of one letter": (("\u00e9.jpg", "e\u0301.png"), ("\u00e9.jpg", "e\u0301.png")),
    "what overlays are called": (("a.png", "a_overlay.png", "b.png"), ("a.png", "a_overlay.png", "b")),
    "another folder": (("a.png", "other/a.jpg"), ("a.png", "a.jpg")),
}


@pytest.mark.parametrize("kind", NAMESAKES)
def test_results_of_namesakes_keep_their_suffixes(model, tmp_path, kind):
    names, stems = NAMESAKES[kind]
    (tmp_path / "other").mkdir()
    paths = [save(tmp_path / name, noise(40, 40, seed)) for seed, name in enumerate(names)]
    done = run(model, paths, tmp_path / "out", with_logits=False)
    assert [result.files["labels"].name for result in done] == [f"{stem}.png" for stem in stems]
    assert len(left(tmp_path / "out")) == 2 * len(names)


def test_two_images_of_one_full_name_are_refused(model, tmp_path):
    (tmp_path / "other").mkdir()
    paths = [save(tmp_path / "a.png", noise(40, 40)), save(tmp_path / "other" / "a.png", noise(40, 40))]
    with raises(DataError, *paths, tmp_path / "out" / "a.png.png"):
        run(model, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_too_long_for_its_results_is_a_problem_of_its_own(model, tmp_path):
    paths = [save(tmp_path / f"{'n' * length}.jpg", noise(40, 40)) for length in (251, 243, 240)]
    failed, *done = run(model, paths, tmp_path / "out", with_logits=False)
    assert "choose a shorter name" in failed.problem
    assert all(len(result.files) == 2 and not result.problem for result in done)
    assert len([name for name in left(tmp_path / "out") if name.endswith("_overlay.png")]) == 2


def test_an_image_is_never_overwritten_by_its_result(model, tmp_path):
    path = save(tmp_path / "a.png", noise(40, 40))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"a\.png would overwrite this file; choose another --out"):
        run(model, [path], tmp_path / "sub" / "..")
    assert path.read_bytes() == before
    assert left(tmp_path) == ["a.png"]


def broken_png():
    size = struct.pack(">II", 40, 40)
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + size + b"\x08\x02\x00\x00\x00" + b"garbage"


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", broken_png(), b"\xff\xd8\xff\xe0 cut off"],
    ids=["empty", "text", "damaged PNG", "cut JPEG"],
)
def test_an_unreadable_image_is_named_and_leaves_no_file(model, tmp_path, content):
    good = save(tmp_path / "good.png", noise(40, 40))
    (tmp_path / "bad.jpg").write_bytes(content)
    failed, done = run(model, [tmp_path / "bad.jpg", good], tmp_path / "out")
    assert "bad.jpg: " in failed.problem
    assert (failed.image.name, failed.files, done.problem) == ("bad.jpg", {}, "")
    assert left(tmp_path / "out") == ["good.npy", "good.png", "good_overlay.png"]


def test_a_full_disk_leaves_nothing_half_written(model, tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise(40, 40))
    run(model, [path], tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    write = os.write

    def full(descriptor, data):
        if len(data) < 10_000:
            return write(descriptor, data)
        write(descriptor, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    save(path, noise(40, 40, seed=5))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match=r"a\.npy: could not be written: No space left.*make room"):
        run(model, [path], tmp_path / "out")
    monkeypatch.undo()
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys()
    assert after["a.npy"] == before["a.npy"]
