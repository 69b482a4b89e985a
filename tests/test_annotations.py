"""Annotations: read, and refused where they are hostile or wrong. The contact sheet drawn from them."""

import numpy as np
import pytest
from PIL import Image
from support import real
from support.data import empty_voc, encoded, noise

from segnet_scratch import data
from segnet_scratch.data import VOCDataset, voc_palette
from segnet_scratch.data.annotations import Annotation, ObjectBox, read_annotation
from segnet_scratch.data.contact_sheet import MAX_COUNT, contact_sheet, spread
from segnet_scratch.data.findings import FoundError
from segnet_scratch.errors import DataError

VOC_STYLE = b"""<annotation>
	<folder>VOC2012</folder>
	<filename>2007_000027.jpg</filename>
	<source><database>The VOC2007 Database</database></source>
	<size><width>486</width><height>500</height><depth>3</depth></size>
	<segmented>0</segmented>
	<object>
		<name>person</name><pose>Unspecified</pose><truncated>1</truncated><difficult>0</difficult>
		<bndbox><xmin>174</xmin><ymin>101</ymin><xmax>349</xmax><ymax>351</ymax></bndbox>
		<part><name>head</name><bndbox><xmin>169</xmin><ymin>104</ymin><xmax>209</xmax><ymax>146</ymax></bndbox></part>
	</object>
	<object>
		<bndbox><ymax>62.5</ymax><xmax>52</xmax><ymin>1</ymin><xmin>45.70000076293945</xmin></bndbox>
		<name>tvmonitor</name><difficult>1</difficult>
	</object>
</annotation>"""


@pytest.fixture
def read(tmp_path):
    def run(content: bytes):
        path = tmp_path / "a.xml"
        path.write_bytes(content)
        return read_annotation(path)

    return run


def test_an_annotation_of_voc_is_read(read):
    assert read(VOC_STYLE) == Annotation(
        (500, 486),
        (
            ObjectBox("person", (174, 101, 349, 351), difficult=False, truncated=True),
            ObjectBox("tvmonitor", (45.70000076293945, 1, 52, 62.5), difficult=True, truncated=False),
        ),
    )


def test_an_image_without_objects_is_fine(read):
    assert read(b"<annotation><size><width>1</width><height>2</height></size></annotation>").objects == ()
    in_a_namespace = b'<annotation xmlns="urn:x"><size><width>1</width><height>2</height></size></annotation>'
    assert read(in_a_namespace).size == (2, 1)


LAUGHS = b'<!DOCTYPE a [<!ENTITY a0 "ha">' + b"".join(
    b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10) for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (LAUGHS + b"]><annotation>&a9;</annotation>", "annotation-dtd"),
        (b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>', "annotation-dtd"),
        (b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd"><annotation/>', "annotation-dtd"),
        (b'<!DOCTYPE a [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]><annotation/>', "annotation-dtd"),
        (b"<!DOCTYPE annotation><annotation/>", "annotation-dtd"),
        (b"<annotation>&undefined;</annotation>", "annotation-not-xml"),
        (b"", "annotation-not-xml"),
        (b"<annotation><size>", "annotation-not-xml"),
        (b"<a></b>", "annotation-not-xml"),
        (b"<a/><a/>", "annotation-not-xml"),
        (b"\x00\x01", "annotation-not-xml"),
        (b"<?xml version='1.0' encoding='no-such'?><annotation/>", "annotation-not-xml"),
        (b"<?xml version='1.0' encoding='utf-8'?><annotation>\xff</annotation>", "annotation-not-xml"),
        (b"<a>" * 40 + b"</a>" * 40, "annotation-too-large"),
        (b"<a>" + b" " * (1 << 20) + b"</a>", "annotation-too-large"),
        (b"<annotation/>", "annotation-unexpected"),
        (VOC_STYLE.replace(b"<width>486</width>", b""), "annotation-unexpected"),
        (VOC_STYLE.replace(b"486", b"-486"), "annotation-unexpected"),
        (VOC_STYLE.replace(b"486", b"486.5"), "annotation-unexpected"),
        (VOC_STYLE.replace(b"174", b"nan"), "annotation-unexpected"),
        (VOC_STYLE.replace(b"174", b"1e999"), "annotation-unexpected"),
        (VOC_STYLE.replace(b"174", b""), "annotation-unexpected"),
        (VOC_STYLE.replace(b"174", b"350"), "annotation-unexpected"),
        (VOC_STYLE.replace(b"<ymin>101</ymin>", b"<ymin>352</ymin>"), "annotation-unexpected"),
        (VOC_STYLE.replace(b"<name>person</name>", b"<name> </name>"), "annotation-unexpected"),
        (VOC_STYLE.replace(b"<name>person</name>", b""), "annotation-unexpected"),
        (VOC_STYLE.replace(b"person", b"x" * 101), "annotation-unexpected"),
        (VOC_STYLE.replace(b"<truncated>1", b"<truncated>yes"), "annotation-unexpected"),
    ],
)
def test_what_is_no_annotation_is_named(read, tmp_path, content, code):
    with pytest.raises(FoundError) as caught:
        read(content)
    assert caught.value.finding.code == code
    assert str(tmp_path / "a.xml") in str(caught.value)


def test_a_missing_annotation_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.xml: cannot be read"):
        read_annotation(tmp_path / "none.xml")


# --- contact sheet -------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """One grey image of 120 x 240: below its middle cow, left of column 20 void, else background; a box on the cow."""
    root = empty_voc(tmp_path / "set")
    (root / "Annotations").mkdir()
    (root / "JPEGImages/a.png").write_bytes(encoded(np.full((120, 240, 3), 100, np.uint8), "PNG"))
    mask = np.zeros((120, 240), np.uint8)
    mask[60:] = 10
    mask[:, :20] = 255
    data.save_indexed_png(root / "SegmentationClass/a.png", mask)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\n")
    (root / "Annotations/a.xml").write_text(
        "<annotation><size><width>240</width><height>120</height></size><object><name>cow</name>"
        "<bndbox><xmin>101</xmin><ymin>61</ymin><xmax>200</xmax><ymax>110</ymax></bndbox></object></annotation>"
    )
    return root


def test_the_sheet_shows_boxes_and_classes_where_they_are(root):
    sheet = np.array(contact_sheet(VOCDataset(root, "train"), [0]))
    (rows, columns) = np.nonzero((sheet == 100).all(axis=2))
    top, left = rows.min(), columns.min()  # of the image, which the sheet shows at its own size
    photo, painted = sheet[top : top + 120, left : left + 240], sheet[top : top + 120, left + 242 : left + 482]
    cow = voc_palette()[10]
    box = (photo == cow).all(axis=2)
    assert box[109, 100:200].all()
    assert box[61:110, 199].all()
    assert not box[:60].any()
    assert not box[80:108, 150:197].any(), "the name is at the upper left, the inside is free"
    np.testing.assert_array_equal(painted[:60, 20:], 100)
    np.testing.assert_array_equal(painted[:, :20], np.broadcast_to(voc_palette()[255], (120, 20, 3)))
    np.testing.assert_array_equal(painted[60:, 20:], np.broadcast_to(np.rint(0.4 * 100 + 0.6 * cow), (60, 220, 3)))
    legend = sheet[top + 120 :]
    for label in (0, 10, 255):
        assert (legend == voc_palette()[label]).all(axis=2).sum() > 60, label
    assert not (legend == voc_palette()[9]).all(axis=2).any()


def test_without_annotations_there_are_no_boxes(root):
    (root / "Annotations/a.xml").unlink()
    sheet = np.array(contact_sheet(VOCDataset(root, "train"), [0]))
    rows, columns = np.nonzero((sheet == 100).all(axis=2))
    photo = sheet[rows.min() : rows.min() + 120, columns.min() : columns.min() + 240]
    assert (photo == 100).all()


@pytest.mark.parametrize(
    "box", [(1, 1, 1, 1), (240, 120, 240, 120), (-500, -500, 900, 900), (500, 500, 600, 600), (0.5, 0.5, 0.7, 0.7)]
)
def test_boxes_anywhere_do_not_break_the_sheet(root, box):
    text = (root / "Annotations/a.xml").read_text()
    for tag, old, new in zip(("xmin", "ymin", "xmax", "ymax"), (101, 61, 200, 110), box, strict=True):
        text = text.replace(f"<{tag}>{old}<", f"<{tag}>{new}<")
    (root / "Annotations/a.xml").write_text(text.replace("cow", "an unknown thing with a long name"))
    contact_sheet(VOCDataset(root, "train"), [0])


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (5, 12), (1449, 12), (10, 10), (7, 1)])
def test_indices_are_spread_over_the_whole_split(count, wanted):
    indices = spread(count, wanted)
    assert len(indices) == min(count, wanted)
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    assert len(indices) == 1 or indices[-1] == count - 1


def test_the_command_writes_a_picture(voc, segnet, tmp_path):
    finished = segnet("data", "show", voc, tmp_path / "out/sheet.png", "--count", "5")
    assert finished.code == 0, finished.err
    assert "5 of the 8 images of train" in finished.out
    with Image.open(tmp_path / "out/sheet.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.width > 480
    finished = segnet("data", "show", voc, tmp_path / "two.png", "--split", "val", "--ids", "b", "--ids", "a")
    assert "2 of the 2 images of val" in finished.out
    refused = segnet("data", "show", voc, tmp_path / "none.png", "--ids", "nobody")
    assert refused.code == 1
    assert "no image 'nobody'" in refused.err
    assert not (tmp_path / "none.png").exists()


def test_too_many_and_no_images_are_refused(voc):
    dataset = VOCDataset(voc, "train")
    for indices in ([], [0] * (MAX_COUNT + 1)):
        with pytest.raises(DataError, match="contact sheet of"):
            contact_sheet(dataset, indices)


@pytest.mark.parametrize("parts", [("VOCdevkit", "VOC2012"), ("CamVid",)])
def test_real_images_are_drawn(parts):
    dataset = VOCDataset(real("data", *parts), "val")
    assert contact_sheet(dataset, spread(len(dataset), 6)).height > 300


def test_all_sizes_are_drawn(tmp_path):
    root = empty_voc(tmp_path / "set")
    sizes = [(1, 1), (1, 400), (400, 1), (3, 2), (240, 240), (500, 333)]
    for number, size in enumerate(sizes):
        (root / f"JPEGImages/{'n' * 60}{number}.png").write_bytes(encoded(noise(*size), "PNG"))
        data.save_indexed_png(root / f"SegmentationClass/{'n' * 60}{number}.png", np.zeros(size, np.uint8))
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"{'n' * 60}{n}\n" for n in range(len(sizes))))
    dataset = VOCDataset(root, "train")
    contact_sheet(dataset, range(len(sizes)))
