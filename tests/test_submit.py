"""The results archive for VOC's server: what it holds, what is refused, and that its checker can fail."""

import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from support.evaluation import network, segment

from segnet_scratch.data import VOC_CLASSES, VOCDataset, indexed_picture, voc_palette
from segnet_scratch.errors import ConfigError, DataError
from segnet_scratch.inference import Inference, Segmenter
from segnet_scratch.submit import Competition, check_results, submit

SIZE = (32, 48)
IDS = ("2008_000006", "2008_000011", "2008_000012")
SIZES = {"2008_000006": (40, 50), "2008_000011": (33, 47), "2008_000012": (60, 20)}


@pytest.fixture(scope="module")
def model():
    model = network(classes=21)
    model.metadata = {"classes": list(VOC_CLASSES)}
    return model


@pytest.fixture
def images(tmp_path):
    """A test split as VOC gives it: images and a list, no masks at all."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("\n".join(IDS))
    return VOCDataset(tmp_path, "test", with_masks=False)


def expected(model, images, inference=None):
    """Labels by image id."""
    pictures = (np.array(Image.open(images.image_path(index))) for index in range(len(images)))
    return {name: segment(model, picture, SIZE, inference).labels for name, picture in zip(IDS, pictures, strict=True)}


def verify(read, model, images, inference=None):
    """Every file of `read(id)` -> bytes against what the network says, as the server would look at it."""
    for name, labels in expected(model, images, inference).items():
        picture = Image.open(io.BytesIO(read(name)))
        assert (picture.format, picture.mode, picture.size) == ("PNG", "P", (SIZES[name][1], SIZES[name][0]))
        assert picture.getpalette() == voc_palette().reshape(-1).tolist()
        np.testing.assert_array_equal(np.array(picture), labels)
        assert len(np.unique(labels)) > 2  # else the line above says little


@pytest.mark.parametrize("ending", ["tar", "tgz", "tar.gz"])
def test_an_archive_holds_what_the_server_expects(model, images, tmp_path, ending):
    out = tmp_path / "new" / f"results.{ending}"
    told = []
    folder = submit(Segmenter(model, SIZE), images, out, Competition.comp5, advance=told.append)
    assert str(folder) == "results/VOC2012/Segmentation/comp5_test_cls"
    assert sum(told) == 3
    with tarfile.open(out) as archive:
        assert archive.getnames() == [f"results/VOC2012/Segmentation/comp5_test_cls/{name}.png" for name in IDS]
        verify(lambda name: archive.extractfile(f"{folder}/{name}.png").read(), model, images)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_folder_holds_the_same(model, images, tmp_path):
    out = tmp_path / "out"
    inference = Inference(flip=True)
    folder = submit(Segmenter(model, SIZE, inference), images, out, Competition.comp6)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == [
        f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in IDS
    ]
    verify(lambda name: (out / folder / f"{name}.png").read_bytes(), model, images, inference)
    assert [path.name for path in out.iterdir()] == ["results"]


def test_the_same_results_give_the_same_bytes(model, images, tmp_path):
    for name in ("a.tar", "b.tar"):
        submit(Segmenter(model, SIZE), images, tmp_path / name, Competition.comp6)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_results_that_are_there_are_kept(model, images, tmp_path):
    (tmp_path / "a.tar").write_text("mine")
    with pytest.raises(DataError, match=r"a\.tar: is there already"):
        submit(Segmenter(model, SIZE), images, tmp_path / "a.tar", Competition.comp6)
    assert (tmp_path / "a.tar").read_text() == "mine"
    submit(Segmenter(model, SIZE), images, tmp_path / "out", Competition.comp6)
    with pytest.raises(DataError, match="results: is there already"):
        submit(Segmenter(model, SIZE), images, tmp_path / "out", Competition.comp6)


@pytest.mark.parametrize("name", ["x.zip", "x.tar.bz2", "results.7z"])
def test_an_archive_that_the_server_does_not_take_is_refused(model, images, tmp_path, name):
    with pytest.raises(ConfigError, match="takes a tar archive"):
        submit(Segmenter(model, SIZE), images, tmp_path / name, Competition.comp6)
    assert not (tmp_path / name).exists()


def test_an_error_in_between_leaves_nothing(model, images, tmp_path):
    (images.root / "JPEGImages" / f"{IDS[2]}.jpg").write_bytes(b"no picture")
    for out in (tmp_path / "x" / "a.tar", tmp_path / "y"):
        with pytest.raises(DataError, match=IDS[2]):
            submit(Segmenter(model, SIZE), images, out, Competition.comp6)
    assert list((tmp_path / "x").iterdir()) == list((tmp_path / "y").iterdir()) == []


def test_other_classes_than_voc_s_are_refused(model, images, tmp_path):
    out = tmp_path / "a.tar"
    other = network(classes=6)
    with pytest.raises(DataError, match="the checkpoint has 6 classes, VOC 21"):
        submit(Segmenter(other, SIZE), images, out, Competition.comp6)
    other.metadata = {"classes": ["sky", "building", "pole", "road", "tree", "car"]}
    with pytest.raises(DataError, match=r"the checkpoint has 6 classes \(sky, building, pole, \.\.\.\); VOC's server"):
        submit(Segmenter(other, SIZE), images, out, Competition.comp6)
    renamed = network(classes=21)
    renamed.metadata = {"classes": ["sky", *VOC_CLASSES[1:]]}  # as many, but not VOC's
    with pytest.raises(DataError, match="the checkpoint has 21 classes"):
        submit(Segmenter(renamed, SIZE), images, out, Competition.comp6)
    (images.root / "labels.txt").write_text("\n".join(reversed(VOC_CLASSES)))
    with pytest.raises(DataError, match=r"VOC2012: the data set has 21 classes \(tvmonitor"):
        submit(Segmenter(model, SIZE), VOCDataset(images.root, "test", with_masks=False), out, Competition.comp6)
    with pytest.raises(ConfigError, match="no dropout"):
        submit(Segmenter(model, SIZE, Inference(samples=4)), images, out, Competition.comp6)
    assert not out.exists()


def test_a_validation_split_with_masks_works_too(model, images, tmp_path):
    (images.root / "SegmentationClass").mkdir()
    shutil.copy(images.root / "ImageSets/Segmentation/test.txt", images.root / "ImageSets/Segmentation/val.txt")
    dataset = VOCDataset(images.root, "val", with_masks=False)
    folder = submit(Segmenter(model, SIZE), dataset, tmp_path / "a.tar", Competition.comp6)
    assert folder.name == "comp6_val_cls"


def test_missing_images_are_named_masks_are_not_missed(images):
    path = images.image_path(1)
    path.unlink()
    with pytest.raises(DataError, match="1 of 3 images are missing") as raised:
        VOCDataset(images.root, "test", with_masks=False)
    assert str(path) in str(raised.value)
    assert "masks" not in str(raised.value)
    with pytest.raises(DataError, match="lacks SegmentationClass"):
        VOCDataset(images.root, "test")


# The checker


def png(labels, palette=None, mode="P"):
    picture = indexed_picture(labels)
    if palette is not None:
        picture.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, format="PNG")
    return buffer.getvalue()


def good(rng):
    files = {name: png(rng.integers(0, 21, size).astype(np.uint8)) for name, size in SIZES.items()}
    return files, dict(SIZES)


def as_label(label, size=SIZES[IDS[1]], **options):
    """A result whose upper left pixel has this label, and all others 0."""
    labels = np.zeros(size, np.uint8)
    labels[0, 0] = label
    return png(labels, **options)


ODD = {  # results in place of the second one, and what is said of it
    ".png is of mode RGB": as_label(0, mode="RGB"),
    ".png is of mode L": as_label(0, mode="L"),
    ".png is of mode P, expected P with VOC's palette": as_label(0, palette=voc_palette()[::-1]),
    ".png is (47, 33), its image (33, 47)": as_label(0, SIZES[IDS[1]][::-1]),
    ".png holds label 255, expected 0..20": as_label(255),
    ".png holds label 21": as_label(21),
    ".png cannot be read back": as_label(20)[:-40],
}


def test_good_results_pass():
    check_results(*good(np.random.default_rng(0)), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({IDS[1]: content}, f"{IDS[1]}{said}") for said, content in ODD.items()),
        ({IDS[1]: None}, "1 results are missing, 0 too many"),
        ({"2008_000099": as_label(0)}, "0 results are missing, 1 too many"),
    ],
)
def test_spoilt_results_are_noticed(change, message):
    files, sizes = good(np.random.default_rng(0))
    files = {name: content for name, content in {**files, **change}.items() if content is not None}
    with pytest.raises(DataError) as raised:
        check_results(files, sizes, "here")
    assert message in str(raised.value)
    assert str(raised.value).startswith("here: ")


@pytest.mark.parametrize("ending", ["tar", ""])
def test_what_was_written_wrongly_never_appears(model, images, tmp_path, monkeypatch, ending):
    """Breaks the writer, so that the check of the written files has something to find."""

    def colour_picture(labels):
        return indexed_picture(labels).convert("RGB")

    monkeypatch.setattr("segnet_scratch.submit.indexed_picture", colour_picture)
    out = tmp_path / "new" / f"out.{ending}".rstrip(".")
    with pytest.raises(DataError, match="is of mode RGB"):
        submit(Segmenter(model, SIZE), images, out, Competition.comp6)
    assert not out.exists() or list(out.iterdir()) == []
