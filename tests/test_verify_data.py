"""`segnet data verify`: each kind of damage made once and recognised by its code; mutants; what passes is readable."""

import io
import json
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import count, real
from support.data import chunk, empty_voc, encoded, noise, png

from segnet_scratch import data
from segnet_scratch.data import VOC_CLASSES, VOID, VOCDataset, voc_palette
from segnet_scratch.data.colours import voc_colours
from segnet_scratch.data.conversion import convert_masks
from segnet_scratch.data.findings import CODES, ERRORS, WARNINGS
from segnet_scratch.data.verify import verify
from segnet_scratch.errors import DataError, SegnetError

SIZE = (40, 48)  # height, width

ANNOTATION = """<annotation><filename>{name}.jpg</filename>
<size><width>{width}</width><height>40</height><depth>3</depth></size>
<object><name>{thing}</name><bndbox><xmin>{left}</xmin><ymin>1</ymin><xmax>48</xmax><ymax>40</ymax></bndbox></object>
</annotation>"""


def labels(seed: int) -> np.ndarray:
    mask = np.random.default_rng(seed).integers(0, 21, SIZE).astype(np.uint8)
    mask[:2] = VOID
    return mask


@pytest.fixture
def root(tmp_path):
    """A data set without fault: a, b, c, d for training, e, f for validation."""
    root = empty_voc(tmp_path / "set")
    for seed, name in enumerate("abcdef"):
        (root / f"JPEGImages/{name}.jpg").write_bytes(encoded(noise(*SIZE, seed), "JPEG"))
        data.save_indexed_png(root / f"SegmentationClass/{name}.png", labels(seed))
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\nc\nd\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("e\nf\n")
    return root


def annotate(root: Path, **change: object) -> Path:
    """Gives every id an annotation, and that of b the change."""
    (root / "Annotations").mkdir()
    for name in "abcdef":
        fields = {"name": name, "thing": "dog", "left": 1, "width": 48, **(change if name == "b" else {})}
        (root / f"Annotations/{name}.xml").write_text(ANNOTATION.format(**fields))
    return root / "Annotations/b.xml"


def test_files_that_operating_systems_leave_are_passed_over(root):
    listed = [path for path in root.rglob("*") if path.is_file()]
    for path in listed:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(60))
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (root / "JPEGImages" / name).write_bytes(b"x")
    report = verify(root)
    assert (report.passed, report.splits, list(report.unlisted.values())) == (True, {"train": 4, "val": 2}, [0, 0])
    assert convert_masks(root, root.with_name("new"), voc_colours(data.VOC_CLASSES)) == 6
    assert not list(root.with_name("new").rglob("._*"))


def test_a_sound_set_has_no_findings(root):
    annotate(root)
    report = verify(root)
    assert report.findings == ()
    assert report.passed
    assert report.splits == {"train": 4, "val": 2}
    assert report.pairs == 6
    assert report.sizes == {SIZE: 6}
    assert (report.image_modes, report.mask_modes) == ({"RGB": 6}, {"P": 6})
    assert report.unlisted == {"JPEGImages": 0, "SegmentationClass": 0}
    masks = [labels(seed) for seed in range(6)]
    for label in range(256):
        assert report.pixels[label] == sum((mask == label).sum() for mask in masks), label
        assert report.images[label] == sum((mask == label).any() for mask in masks), label
    assert report.void_share == sum((mask == VOID).sum() for mask in masks) / (6 * SIZE[0] * SIZE[1])


# --- one kind of damage after the other ----------------------------------------------------------

IMAGE, MASK = "JPEGImages/b.jpg", "SegmentationClass/b.png"
TRAIN, VAL = "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"

JPEG = encoded(noise(*SIZE, seed=1), "JPEG")
PNG = encoded(labels(1), "PNG")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
TEXT_BOMB = png(48, 40, 8, 0, bytes(49 * 40), extra=chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(9_000_000))))
OTHERS = {
    "is-html": b"<!DOCTYPE html><html><body>404</body></html>",
    "is-lfs-pointer": LFS,
    "is-tiff": encoded(noise(*SIZE), "TIFF"),
    "is-gif": encoded(labels(1), "GIF"),
    "is-bmp": encoded(noise(*SIZE), "BMP"),
    "is-webp": encoded(noise(*SIZE), "WEBP"),
    "wrong-format": b"MATLAB 5.0 MAT-file, Platform: GLNXA64",
    "zero-bytes": b"",
    "bomb": png(60_000, 60_000, 8, 0, bytes(100)),
}


def animated(first: np.ndarray, second: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(first).save(stream, format="PNG", save_all=True, append_images=[Image.fromarray(second)])
    return stream.getvalue()


def damage(function):
    """`function(root, ...)` damages a data set and returns the path to blame; the rest is given to it ahead."""
    return lambda *arguments, **options: lambda root: function(root, *arguments, **options)


@damage
def put(root, file, content):
    """This content in place of that file's."""
    (root / file).unlink(missing_ok=True)
    (root / file).write_bytes(content)
    return root / file


def put_mask(array, mode=None, **options):
    return put(MASK, encoded(array, "PNG", mode, **options))


@damage
def put_png_image(root, content):
    """A PNG as image b, under the suffix that is right for it."""
    (root / IMAGE).unlink()
    return put("JPEGImages/b.png", content)(root)


@damage
def cut(root, file, share):
    content = (root / file).read_bytes()
    return put(file, content[: int(share * len(content))])(root)


@damage
def flipped(root, file, where):
    """One bit of the byte at this share of the file."""
    content = bytearray((root / file).read_bytes())
    content[int(where * len(content))] ^= 4
    return put(file, bytes(content))(root)


@damage
def removed(root, file):
    (root / file).unlink()
    return root / file


@damage
def renamed(root, file, name):
    (root / file).rename(root / name)
    return root / file


@damage
def in_another_form(root, file):
    """The id b gets an accent, and the name of one file has it in another Unicode form than the lists."""
    listed, other = "e\u0301", "\u00e9"
    for path in (root / IMAGE, root / MASK):
        path.rename(path.with_stem(other if path == root / file else listed))
    for split in (root / "ImageSets/Segmentation").glob("*.txt"):
        split.write_text(split.read_text().replace("b\n", f"{listed}\n"), encoding="utf-8")
    return (root / file).with_stem(listed)


@damage
def linked(root, file, target):
    """A link in place of the file."""
    path, there = root / file, root.parent / target
    if path.exists() and target == "elsewhere":
        shutil.copyfile(path, there)
    path.unlink()
    path.symlink_to(there)
    return path


@damage
def in_place_of(root, file, make):
    """A folder, or a pipe."""
    (root / file).unlink()
    make(root / file)
    return root / file


def unreadable(file):
    """A file that the system refuses to read (simulated: root may read everything)."""

    def refused(root):
        return root / file

    refused.refuses = True
    return refused


def id_again_with_other_case(root):
    shutil.copyfile(root / IMAGE, root / "JPEGImages/B.jpg")
    put("JPEGImages/B.jpg", encoded(noise(*SIZE, seed=77), "JPEG"))(root)
    shutil.copyfile(root / MASK, root / "SegmentationClass/B.png")
    return put(TRAIN, b"a\nb\nc\nd\nB\n")(root)


def rotated(root):
    exif = Image.Exif()
    exif[274] = 6
    return put(IMAGE, encoded(noise(*SIZE, seed=1), "JPEG", exif=exif))(root)


def resized(root, size):
    data.save_indexed_png(root / MASK, np.resize(labels(1), size))
    return root / MASK


def tiny(root):
    put(IMAGE, encoded(noise(20, 48, seed=1), "JPEG"))(root)
    data.save_indexed_png(root / MASK, labels(1)[:20])
    return root / IMAGE


def other_palette(root):
    picture = Image.fromarray(labels(1))
    picture.putpalette(voc_palette()[::-1].copy().tobytes())
    picture.save(root / MASK)
    return root / MASK


def without_class(root):
    for name in "abcd":
        mask = np.array(Image.open(root / f"SegmentationClass/{name}.png"))
        mask[mask == 7] = 0
        data.save_indexed_png(root / f"SegmentationClass/{name}.png", mask)
    return root / TRAIN


annotated = damage(annotate)


@damage
def annotated_by(root, content):
    annotate(root).write_bytes(content)
    return root / "Annotations/b.xml"


def annotation_lost(root):
    path = annotate(root)
    path.unlink()
    return path


def leak(root):
    shutil.copyfile(root / "JPEGImages/a.jpg", root / "JPEGImages/e.jpg")
    return root / "JPEGImages/e.jpg"


def twin(root):
    shutil.copyfile(root / "JPEGImages/a.jpg", root / IMAGE)
    return root / IMAGE


def no_lists(root):
    for file in (TRAIN, VAL):
        (root / file).unlink()
    return root / "ImageSets/Segmentation"


def labels_that_lead_nowhere(root):
    (root / "labels.txt").symlink_to("nowhere")
    return root / "labels.txt"


def odd_name(root):
    return (root / TRAIN).rename(root / "ImageSets/Segmentation/train set.txt")


def without_folder(root):
    shutil.rmtree(root / "SegmentationClass")
    return root / "SegmentationClass"


RGB_MASK = np.where(labels(1)[..., None] == VOID, 0, voc_palette()[labels(1)]).astype(np.uint8)

PNG_IMAGE = encoded(noise(*SIZE, seed=1), "PNG")  # its header ends at byte 33
KINDS = [
    # code, damage; it returns the path that the finding must name
    ("missing-folder", without_folder),
    ("no-splits", no_lists),
    ("split-unreadable", put(TRAIN, b"a\nb\xff\nc\n")),
    ("split-name", odd_name),
    ("empty-split", put(VAL, b"")),
    ("duplicate-id", put(TRAIN, b"a\nb\nc\nd\na\n")),
    ("id-with-path", put(TRAIN, b"a\nb\nc\nd\n../../etc/passwd\n")),
    ("id-with-path", put(TRAIN, b"a\nb\nc\nd\n..\\a\n")),
    ("id-with-path", put(TRAIN, b"/JPEGImages/a.jpg /SegmentationClass/a.png\na\nb\nc\nd\n")),
    ("id-with-suffix", put(TRAIN, b"a\nb\nc\nd.jpg\n")),
    ("bad-id", put(TRAIN, b"a\nb\nc\nd\nx\x1b[2Jy\n")),
    ("bad-id", put(TRAIN, b"a\nb\nc\nd\n" + 300 * b"x" + b"\n")),
    ("split-overlap", put(TRAIN, b"a\nb\nc\nd\ne\n")),
    ("bom-in-split", put(TRAIN, b"\xef\xbb\xbfa\nb\nc\nd\n")),
    ("crlf-in-split", put(TRAIN, b"a\r\nb\r\nc\r\nd\r\n")),
    ("blank-line-in-split", put(TRAIN, b"a\nb\n\nc\nd\n")),
    ("padded-id", put(TRAIN, b"a\nb \nc\nd\n")),
    ("id-case-clash", id_again_with_other_case),
    ("labels-unreadable", put("labels.txt", "\n".join(VOC_CLASSES).encode("utf-16"))),
    ("labels-empty", put("labels.txt", b"\n")),
    ("labels-too-many", put("labels.txt", "\n".join(f"c{n}" for n in range(256)).encode())),
    ("labels-duplicate", put("labels.txt", "\n".join([*VOC_CLASSES[:20], "cat"]).encode())),
    ("labels-unreadable", labels_that_lead_nowhere),
    ("labels-case", put("Labels.txt", "\n".join(VOC_CLASSES).encode())),
    ("labels-colours", put("labels.txt", "\n".join([*VOC_CLASSES[:20], "tv 1 2 3"]).encode())),
    ("labels-name", put("labels.txt", "\n".join([*VOC_CLASSES[:20], "\x1b[31mred"]).encode())),
    *((f"image-{code}", put(IMAGE, content)) for code, content in OTHERS.items()),
    *((f"mask-{code}", put(MASK, content)) for code, content in OTHERS.items()),
    ("image-bomb", put(IMAGE, TEXT_BOMB)),
    ("mask-bomb", put(MASK, TEXT_BOMB)),
    ("image-truncated", cut(IMAGE, 0.5)),
    ("mask-truncated", cut(MASK, 0.5)),
    ("image-damaged", put(IMAGE, JPEG.replace(b"\xff\xc0", b"\xff\xc5", 1))),
    ("image-damaged", put(IMAGE, JPEG[:20])),
    ("mask-damaged", flipped(MASK, 0.6)),
    ("mask-truncated", put(MASK, PNG[:20])),
    ("image-not-a-file", in_place_of(IMAGE, Path.mkdir)),
    ("image-not-a-file", in_place_of(IMAGE, os.mkfifo)),
    ("mask-not-a-file", in_place_of(MASK, Path.mkdir)),
    ("mask-not-a-file", in_place_of(MASK, os.mkfifo)),
    ("image-unreadable", unreadable(IMAGE)),
    ("mask-unreadable", unreadable(MASK)),
    ("image-link-broken", linked(IMAGE, "nowhere")),
    ("mask-link-broken", linked(MASK, "nowhere")),
    ("image-link-broken", linked(IMAGE, "set/JPEGImages/b.jpg")),  # a link to itself
    ("image-link-outside", linked(IMAGE, "elsewhere")),
    ("mask-link-outside", linked(MASK, "elsewhere")),
    ("missing-image", removed(IMAGE)),
    ("missing-mask", removed(MASK)),
    ("image-suffix-case", renamed(IMAGE, "JPEGImages/b.JPG")),
    ("mask-suffix-case", renamed(MASK, "SegmentationClass/b.PNG")),
    ("image-unicode-form", in_another_form(IMAGE)),
    ("mask-unicode-form", in_another_form(MASK)),
    ("ambiguous-image", lambda root: put("JPEGImages/b.png", PNG)(root) and root / IMAGE),
    ("image-suffix-lies", put(IMAGE, encoded(noise(*SIZE, seed=1), "PNG"))),
    ("image-suffix-lies", put_png_image(JPEG)),
    ("image-cmyk", put(IMAGE, encoded(noise(*SIZE, seed=1), "JPEG", "CMYK"))),
    ("image-grey", put(IMAGE, encoded(noise(*SIZE, seed=1)[..., 0], "JPEG"))),
    ("image-16-bit", put_png_image(encoded(noise(*SIZE, seed=1)[..., 0].astype(np.uint16) * 257, "PNG"))),
    ("image-has-alpha", put_png_image(encoded(noise(*SIZE, seed=1), "PNG", "RGBA"))),
    ("image-palette", put_png_image(encoded(noise(*SIZE, seed=1), "PNG", "P"))),
    ("image-exif-rotated", rotated),
    ("image-exif-unreadable", put_png_image(PNG_IMAGE[:33] + chunk(b"eXIf", bytes(range(32))) + PNG_IMAGE[33:])),
    ("image-tiny", tiny),
    ("image-trailing-data", put_png_image(encoded(noise(*SIZE, seed=1), "PNG") + b"PK\x03\x04")),
    ("mask-trailing-data", put(MASK, PNG + b"<?php ?>")),
    ("mask-is-jpeg", put(MASK, encoded(labels(1), "JPEG"))),
    ("mask-rgb", put_mask(RGB_MASK)),
    ("mask-rgb", put_mask(RGB_MASK, "RGBA")),
    ("mask-has-alpha", put_mask(labels(1), "LA")),
    ("mask-16-bit", put_mask(labels(1).astype(np.uint16))),
    ("label-out-of-range", put_mask(np.where(labels(1) == 3, 21, labels(1)).astype(np.uint8))),
    ("label-out-of-range", put_mask(np.where(labels(1) == 3, 254, labels(1)).astype(np.uint8))),
    ("mask-all-void", put_mask(np.full(SIZE, VOID, np.uint8))),
    ("mask-animated", put(MASK, animated(labels(1), labels(2)))),
    ("image-animated", put_png_image(animated(noise(*SIZE, seed=1), noise(*SIZE, seed=2)))),
    ("size-mismatch", lambda root: resized(root, (40, 47))),
    ("size-transposed", lambda root: resized(root, SIZE[::-1])),
    ("palettes-differ", other_palette),
    ("class-absent", without_class),
    ("image-leak", leak),
    ("same-image", twin),
    ("annotation-not-xml", annotated_by(b"<annotation><size>")),
    (
        "annotation-dtd",
        annotated_by(b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>'),
    ),
    ("annotation-too-large", annotated_by(b"<a>" * 100_000)),
    ("annotation-too-large", annotated_by(b"<!--" + bytes(1 << 20) + b"-->")),
    ("annotation-unexpected", annotated(left="nan")),
    ("annotation-unexpected", annotated_by(b"<annotation/>")),
    ("annotation-missing", annotation_lost),
    ("annotation-size", annotated(width=49)),
    ("annotation-box-outside", annotated(left=0)),
    ("annotation-unknown-class", annotated(thing="unicorn")),
]


IDS = [f"{code}-{number}" for number, (code, _) in enumerate(KINDS)]
# What one kind of damage brings with it.
ALSO = {
    "labels-too-many": {"class-absent"},
    "labels-empty": {"label-out-of-range"},
    "labels-unreadable": {"label-out-of-range"},
    "missing-folder": {"missing-mask"},
}


def is_readable(root, splits) -> bool:
    """Whether VOCDataset takes every sample of these splits."""
    try:
        for split in splits:
            dataset = VOCDataset(root, split)
            for index in range(len(dataset)):
                image, mask, _ = dataset.sample(index)
                assert image.shape == (*mask.shape, 3)
    except DataError:
        return False
    return True


@pytest.mark.parametrize(("code", "spoil"), KINDS, ids=IDS)
def test_every_kind_of_damage_is_named(root, code, spoil, monkeypatch):
    path = spoil(root)
    if getattr(spoil, "refuses", False):
        opened = Path.open

        def refusing(self, *arguments, **options):
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return opened(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", refusing)
    report = verify(root)
    found = report.by_code()
    assert code in found, {name: findings[0].detail for name, findings in found.items()}
    assert path in [finding.path for finding in found[code]]
    assert set(found) - {code} <= ALSO.get(code, set())
    assert report.passed == (code in WARNINGS)
    json.dumps(report.to_json(), allow_nan=False)
    # A reader that goes by the report: what passes can be read, what does not is refused where reading it matters.
    harmless_to_read = {"split-overlap", "image-leak", "no-splits"}  # yet no score would mean anything
    expected = report.passed or code in harmless_to_read or code.startswith("annotation-")
    assert is_readable(root, report.splits) == expected


def test_every_code_has_its_test():
    of_a_list = {"void-as-class", "labels-0-and-255", "labels-from-1", "palette-not-voc"}  # test_suspicions.py
    assert {code for code, _ in KINDS} | of_a_list == set(CODES)
    assert len(CODES) > 70
    assert not set(ERRORS) & set(WARNINGS)


def test_the_documentation_lists_every_code():
    text = (Path(__file__).parents[1] / "docs" / "reference" / "data-findings.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \|$", text, re.MULTILINE))
    assert listed == CODES


def test_one_bad_file_hides_no_other(root):
    put("JPEGImages/a.jpg", b"")(root)
    put("SegmentationClass/a.png", b"")(root)
    put("SegmentationClass/c.png", LFS)(root)
    put(TRAIN, b"../x\na\nb\nc\nd\nd\n")(root)
    codes = {finding.code for finding in verify(root).findings}
    assert codes == {"image-zero-bytes", "mask-zero-bytes", "mask-is-lfs-pointer", "id-with-path", "duplicate-id"}


def test_splits_can_be_chosen(root):
    put("ImageSets/Segmentation/test.txt", b"x\ny\n")(root)  # VOC's test images come without masks
    assert [finding.code for finding in verify(root).findings] == ["missing-image"] * 2 + ["missing-mask"] * 2
    report = verify(root, ["train", "val"])
    assert report.passed
    assert set(report.splits) == {"train", "val"}
    assert report.unlisted == {"JPEGImages": 0, "SegmentationClass": 0}
    assert verify(root, ["val"]).unlisted == {"JPEGImages": 4, "SegmentationClass": 4}
    with pytest.raises(DataError, match="there are: test, train, val"):
        verify(root, ["valid"])


def test_trainval_overlaps_by_definition(root):
    put("ImageSets/Segmentation/trainval.txt", b"a\nb\nc\nd\ne\nf\n")(root)
    put("ImageSets/Segmentation/train_aug.txt", b"a\nb\nc\nd\n")(root)
    assert verify(root).findings == ()
    put("ImageSets/Segmentation/train_aug.txt", b"a\nb\nc\nd\nf\n")(root)
    (finding,) = verify(root).findings
    assert (finding.code, finding.path.name) == ("split-overlap", "train_aug.txt")
    assert "1 of its 5 ids stand in val.txt too (f)" in finding.detail


def test_an_incomplete_root_is_examined_and_nothing_is_not(root, tmp_path):
    shutil.rmtree(root / "SegmentationClass")
    report = verify(root)
    assert {finding.code for finding in report.findings} == {"missing-folder", "missing-mask"}
    assert report.sizes.total() == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data set in VOC layout"):
        verify(tmp_path / "empty")


def test_a_linked_folder_is_no_link_out_of_the_set(root, tmp_path):
    (root / "JPEGImages").rename(tmp_path / "disk")
    (root / "JPEGImages").symlink_to(tmp_path / "disk", target_is_directory=True)
    (root / "SegmentationClass/b.png").rename(root / "SegmentationClass/x.png")
    (root / "SegmentationClass/b.png").symlink_to("x.png")
    assert verify(root).findings == ()


def test_grey_masks_and_cut_palettes_are_no_fault(root):
    Image.fromarray(labels(1)).save(root / MASK)
    picture = Image.fromarray((labels(0) % 4).astype(np.uint8))
    picture.putpalette(voc_palette()[:4].tobytes())
    picture.save(root / "SegmentationClass/a.png", bits=2)
    report = verify(root)
    assert report.findings == ()
    assert report.mask_modes == {"P": 5, "L": 1}


def test_workers_do_not_change_the_report(root):
    put("JPEGImages/a.jpg", b"")(root)
    reports = [verify(root, workers=workers).to_json() for workers in (0, 1, 3)]
    assert reports[0] == reports[1] == reports[2]


# --- mutants -------------------------------------------------------------------------------------


def mutate(content: bytes, number: int, rng: np.random.Generator) -> bytes:
    """The file with some bytes changed, cut out, doubled or zeroed."""
    result = bytearray(content)
    place = int(rng.integers(0, len(result) if number % 2 else min(200, len(result))))
    kind = number % 5
    if kind == 0:
        del result[max(1, place) :]
    elif kind == 1:
        del result[place : place + int(rng.integers(1, 30))]
    elif kind == 2:
        result[place:place] = result[place : place + int(rng.integers(1, 30))]
    elif kind == 3:
        result[place : place + 16] = bytes(len(result[place : place + 16]))
    for where in rng.integers(0, len(result), int(rng.integers(1, 4))) if kind == 4 else ():
        result[int(where)] ^= int(rng.integers(1, 256))
    return bytes(result)


def test_mutated_pictures_are_caught_or_decoded_soundly(root):
    """2,000 mutants at the full count: every one is named with its file, or reads as VOCDataset would have it."""
    images = count(100, 2_000)
    rng = np.random.default_rng(8)
    image_jpeg, image_png = encoded(noise(*SIZE, 50), "JPEG"), encoded(noise(*SIZE, 50), "PNG")
    mask = labels(50)
    data.save_indexed_png(root / "m.png", mask)
    mask_png = (root / "m.png").read_bytes()
    mutated: dict[str, Path] = {}
    for number in range(images):
        name = f"x{number}"
        image, labelled = root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png"
        original = (image_jpeg, image_png, mask_png)[number % 3]
        mutated[name] = labelled if original is mask_png else image
        image.write_bytes(image_png if original is mask_png else original)
        labelled.write_bytes(mask_png)
        content = mutate(original, number // 3, rng)
        mutated[name].write_bytes(content if content != original else original[:-20])
    put("ImageSets/Segmentation/train.txt", "\n".join(mutated).encode())(root)
    report = verify(root, ["train"])
    errors = {}
    for finding in report.findings:
        if finding.is_error:
            errors.setdefault(finding.path, finding)
    dataset = VOCDataset(root, "train")
    sound = 0
    for index, name in enumerate(dataset.ids):
        named = [path for path in (dataset.image_path(index), dataset.mask_path(index)) if path in errors]
        if named:
            # The blame is on the mutant, but for a picture whose size has changed: that shows at the mask.
            size = errors[named[0]].code.startswith("size-")
            assert named == [mutated[name]] or size
            with pytest.raises(SegnetError):
                dataset.sample(index)
            continue
        sound += 1
        image, read, _ = dataset.sample(index)
        np.testing.assert_array_equal(read, mask)
        assert image.shape == (*SIZE, 3)
        if index % 3:  # PNG: its checksums leave no change of a pixel unnoticed
            np.testing.assert_array_equal(image, noise(*SIZE, 50))
    assert len(errors) > 0.6 * images
    assert sound + len(errors) == images


# --- real data and the command -------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "pairs"), [(("VOCdevkit", "VOC2012"), 200), (("CamVid",), 101)])
def test_real_data_has_no_findings(parts, pairs):
    report = verify(real("data", *parts), ["val"])
    assert report.findings == ()
    assert report.pairs == pairs


def test_the_command_tells_codes_counts_and_the_way_out(root, segnet, tmp_path):
    finished = segnet("data", "verify", root, "--json", tmp_path / "out/report.json")
    assert finished.code == 0
    assert "no errors, 0 warnings" in finished.out
    assert "tvmonitor" in finished.out
    assert json.loads((tmp_path / "out/report.json").read_text())["passed"] is True
    for name in "abcd":
        put(f"SegmentationClass/{name}.png", encoded(RGB_MASK, "PNG"))(root)
    put("JPEGImages/e.jpg", encoded(noise(*SIZE)[..., 0], "JPEG"))(root)
    finished = segnet("data", "verify", root, "--json", tmp_path / "out/report.json")
    assert finished.code == 1
    assert "error mask-rgb: the mask holds colours in place of class numbers (4)" in finished.out
    assert finished.out.count("colour-coded mask") == 3
    assert "and 1 more" in finished.out
    assert "warning image-grey" in finished.out
    assert "4 errors in 6" in finished.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["passed"] is False
    assert [finding["code"] for finding in report["findings"]] == ["mask-rgb"] * 4 + ["image-grey"]
    assert report["findings"][0]["file"] == str(root / "SegmentationClass/a.png")


def test_names_out_of_a_damaged_set_do_not_steer_the_terminal(root, segnet):
    put("labels.txt", "\n".join([*VOC_CLASSES[:20], "\x1b[31mred"]).encode())(root)
    (root / TRAIN).rename(root / "ImageSets/Segmentation/train\x1b[2J.txt")
    finished = segnet("data", "verify", root)
    assert finished.code == 1
    assert "\x1b" not in finished.out + finished.err
