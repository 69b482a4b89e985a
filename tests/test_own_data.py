"""Data sets made of outlines (LabelMe, COCO) and of plain folders; and the page on own data, block by block."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT

from segnet_scratch.data import VOID, VOCDataset, draw_sample, sample_rng, voc_palette
from segnet_scratch.data.polygons import polygon_inside, run_lengths
from segnet_scratch.data.verify import verify
from segnet_scratch.data.voc import read_split

LABELS = ("background", "circle", "square", "triangle", "star", "ring")
SIZE = (48, 64)
PAGE = ROOT / "docs" / "how-to" / "own-data.md"


def samples(count):
    return [draw_sample(SIZE, sample_rng(7, 0, number)) for number in range(count)]


def outline(region):
    """One polygon [(x, y), ...] round all pixels of a region, along their edges; loops are joined by ways and back."""
    inside = np.pad(region, 1)
    ways = {}
    for r, c in zip(*np.nonzero(region), strict=True):
        r, c = int(r), int(c)
        for (dr, dc), start, end in (
            ((-1, 0), (c, r), (c + 1, r)),
            ((0, 1), (c + 1, r), (c + 1, r + 1)),
            ((1, 0), (c + 1, r + 1), (c, r + 1)),
            ((0, -1), (c, r + 1), (c, r)),
        ):
            if not inside[r + 1 + dr, c + 1 + dc]:
                ways.setdefault(start, []).append(end)
    path, homes = [], []
    while ways:
        place = next(iter(ways))
        homes.append(place)
        loop = [place]
        while place in ways:
            following = ways[place].pop()
            if not ways[place]:
                del ways[place]
            place = following
            loop.append(place)
        path += loop
    return path + homes[::-1]


def regions(mask):
    """(label, region) of every class of a mask but the background, and of void."""
    names = {**dict(enumerate(LABELS)), VOID: "void"}
    return [(names[int(label)], mask == label) for label in np.unique(mask) if label]


def write_labelme(folder, pictures, suffix="jpg"):
    folder.mkdir()
    for number, (image, mask) in enumerate(pictures):
        Image.fromarray(image).save(folder / f"photo {number}.{suffix}", quality=95)
        shapes = [{"label": name, "points": outline(region)} for name, region in regions(mask)]
        document = {"version": "5.4", "imagePath": f"photo {number}.{suffix}", "imageData": "never looked at"}
        document |= {"imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": shapes}
        (folder / f"photo {number}.json").write_text(json.dumps(document))
    return folder


def runs_of(region):
    flat = region.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    return np.diff([0, *changes, flat.size]).tolist()


def compressed(runs):
    """COCO's text of runs: from the fourth on less the number two before; five bits a character."""
    text = ""
    for k, run in enumerate(runs):
        value = run - runs[k - 2] if k > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            last = (value == 0 and not bits & 16) or (value == -1 and bits & 16)
            text += chr(48 + (bits if last else bits | 32))
            if last:
                break
    return text


def segmentation(region, how):
    if how == "polygons":
        return [[number for point in outline(region) for number in point]]
    runs = runs_of(region)
    return {"size": list(SIZE), "counts": runs if how == "runs" else compressed(runs)}


def write_coco(file, pictures, how="polygons"):
    (file.parent / "photos").mkdir(exist_ok=True)
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 90 - k, "name": n} for k, n in enumerate(LABELS)],
    }
    document["categories"].append({"id": 3, "name": "void"})
    ids = {category["name"]: category["id"] for category in document["categories"]}
    for number, (image, mask) in enumerate(pictures):
        Image.fromarray(image).save(file.parent / "photos" / f"{number}.png")
        document["images"].append(
            {"id": f"i{number}", "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
        )
        for name, region in regions(mask):
            entry = {
                "id": len(document["annotations"]),
                "image_id": f"i{number}",
                "category_id": ids[name],
                "iscrowd": 0,
            }
            document["annotations"].append(entry | {"segmentation": segmentation(region, how), "bbox": [0, 0, 1, 1]})
    file.write_text(json.dumps(document))
    return file


def write_folders(folder, pictures, palette=None):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (image, mask) in enumerate(pictures):
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask if palette is None else palette[mask]).save(folder / "masks" / f"{number}.png")
    return folder


def names_file(path, names=LABELS):
    path.write_text("\n".join(names) + "\n")
    return path


def assert_same_masks(root, pictures, key=int, palette=lambda dataset: dataset.palette):
    dataset = VOCDataset(root, "trainval")
    assert dataset.names == LABELS
    assert len(dataset) == len(pictures)
    for index, name in enumerate(dataset.ids):
        mask = pictures[key(name)][1]
        np.testing.assert_array_equal(dataset.sample(index)[1], mask)
        with Image.open(dataset.mask_path(index)) as picture:
            np.testing.assert_array_equal(np.array(picture.convert("RGB")), palette(dataset)[mask])
    assert [finding for finding in verify(root).findings if finding.is_error] == []


SOURCES = {
    "labelme": lambda folder, pictures: [write_labelme(folder / "photos", pictures)],
    "folders": lambda folder, pictures: [write_folders(folder / "set", pictures), "--labels"],
    "colours": lambda folder, pictures: [
        write_folders(folder / "set", pictures, voc_palette()),
        "--colors",
        "voc",
        "--labels",
    ],
    **{
        f"coco {how}": lambda folder, pictures, how=how: [
            write_coco(folder / "instances.json", pictures, how),
            "--images",
            folder / "photos",
            "--labels",
        ]
        for how in ("polygons", "runs", "text")
    },
}


@pytest.mark.parametrize("source", SOURCES)
def test_each_kind_of_source_gives_the_masks_that_it_was_made_from(source, tmp_path, segnet):
    pictures = samples(5)
    arguments = SOURCES[source](tmp_path, pictures)
    labels = names_file(tmp_path / "classes.txt")
    if source == "labelme":
        arguments += ["--labels"]
    done = segnet("data", "convert", *arguments, labels, tmp_path / "new", "--val", "0.4")
    assert done.code == 0, done.err
    assert "train 3, trainval 5, val 2 images" in done.out
    palette = {"palette": lambda _: voc_palette()} if source == "colours" else {}  # those that the masks had
    assert_same_masks(tmp_path / "new", pictures, lambda name: int(name.removeprefix("photo_")), **palette)


def test_lists_are_drawn_by_the_seed(tmp_path, segnet):
    folder, labels = write_folders(tmp_path / "set", samples(2) * 6), names_file(tmp_path / "classes.txt")
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}"
        segnet("data", "convert", folder, out, "--labels", labels, "--seed", str(seed), "--val", "0.25")
        train, val, both = (read_split(out, name) for name in ("train", "val", "trainval"))
        assert sorted(train + val) == sorted(both) == sorted(map(str, range(12)))
        drawn.append(val)
    assert len(drawn[0]) == 3
    assert drawn[0] == drawn[1] != drawn[2]
    for share in ("0", "1", "0.99"):
        failed = segnet("data", "convert", folder, tmp_path / "none", "--labels", labels, "--val", share)
        assert failed.code == 1
        assert f"a share of {float(share)} of 12 images" in failed.err


def inside_by_hand(points, x, y):
    """Whether a ray to the right crosses an odd number of edges."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if (y0 > y) != (y1 > y):
            crossings += x < x0 + (y - y0) / (y1 - y0) * (x1 - x0)
    return crossings % 2 == 1


def test_polygons_hold_the_pixels_whose_centre_lies_inside():
    rng = np.random.default_rng(3)
    for corners in (3, 4, 9):
        for _ in range(8):
            points = rng.uniform(-6, 30, (corners, 2))  # many cross themselves, and the border of the image
            got = polygon_inside(points, (17, 23))
            expected = [[inside_by_hand(points.tolist(), c + 0.5, r + 0.5) for c in range(23)] for r in range(17)]
            np.testing.assert_array_equal(got, expected)
    square = polygon_inside(np.array([(2, 1), (5, 1), (5, 3), (2, 3)], float), (4, 6))
    np.testing.assert_array_equal(np.argwhere(square), [(r, c) for r in (1, 2) for c in (2, 3, 4)])


def test_runs_as_text():
    rng = np.random.default_rng(5)
    for scale in (3, 40, 5000, 1_000_000):
        runs = rng.integers(0, scale, 40).tolist()
        assert run_lengths(compressed(runs)) == runs
    assert run_lengths("06") == [0, 6]
    assert run_lengths("PP1") == [1024]  # no bits twice, each time with more to come; then 1 << 10
    with pytest.raises(ValueError, match="character"):
        run_lengths("a\x7f")


def one(tmp_path, shapes, size=(8, 10)):
    """The mask that LabelMe's shapes make, by way of the command's functions."""
    folder = tmp_path / "one"
    folder.mkdir()
    Image.new("RGB", size[::-1]).save(folder / "a.png")
    Image.new("RGB", size[::-1]).save(folder / "b.png")
    (folder / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": shapes}))
    (folder / "b.json").write_text(json.dumps({"imagePath": "..\\one\\b.png", "shapes": []}))
    return folder


def rectangle(label, left, top, right, bottom):
    return {"label": label, "shape_type": "rectangle", "points": [[right, bottom], [left, top]]}


def test_shapes_of_labelme_and_their_order(tmp_path, segnet):
    shapes = [rectangle("a", 0, 0, 6, 6), rectangle("b", 2, 2, 9, 4), rectangle("_background_", 3, 3, 5, 8)]
    shapes += [{"label": "void", "shape_type": "circle", "points": [[8.5, 6.5], [8.5, 7.7]]}]
    assert segnet("data", "convert", one(tmp_path, shapes), tmp_path / "new", "--val", "0.5").code == 0
    expected = np.zeros((8, 10), np.uint8)
    expected[:6, :6] = 1
    expected[2:4, 2:9] = 2
    expected[3:8, 3:5] = 0
    expected[6, 7:10] = expected[5:8, 8] = VOID
    dataset = VOCDataset(tmp_path / "new", "trainval")
    assert dataset.names == ("background", "a", "b")
    np.testing.assert_array_equal(dataset.sample(0)[1], expected)
    assert not dataset.sample(1)[1].any()


def box(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def coco(tmp_path, annotations, **changes):
    for name in ("a", "b"):
        Image.new("RGB", (10, 8)).save(tmp_path / f"{name}.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png", "height": 8, "width": 10}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "tree"}],
        "annotations": [{"id": 11 + k, "image_id": 1, **entry} for k, entry in enumerate(annotations)],
    }
    (tmp_path / "c.json").write_text(json.dumps({**document, **changes}))
    return tmp_path / "c.json"


def test_cocos_crowds_lie_below_and_small_objects_on_top(tmp_path, segnet):
    crowd = np.zeros((8, 10), bool)
    crowd[:, 9] = crowd[0] = True
    file = coco(
        tmp_path,
        [
            {"category_id": 7, "segmentation": [box(2, 2, 4, 4)]},
            {"category_id": 2, "segmentation": [box(0, 0, 5, 5), box(7, 6, 10, 8)]},
            {"category_id": 7, "iscrowd": 1, "segmentation": {"size": [8, 10], "counts": compressed(runs_of(crowd))}},
        ],
    )
    assert segnet("data", "convert", file, tmp_path / "new", "--val", "0.5").code == 0
    dataset = VOCDataset(tmp_path / "new", "trainval")
    assert dataset.names == ("background", "tree", "cat")  # by the numbers of the categories
    expected = np.zeros((8, 10), np.uint8)
    expected[crowd] = 2
    expected[:5, :5] = expected[6:, 7:] = 1
    expected[2:4, 2:4] = 2
    np.testing.assert_array_equal(dataset.sample(0)[1], expected)


CAT = {"category_id": 7, "segmentation": [box(1, 1, 3, 3)]}
COCO_FAULTS = [
    ({"annotations": [CAT | {"segmentation": []}]}, r"annotation 11: expected polygons"),
    (
        {"annotations": [CAT | {"segmentation": [[1, 2, 3, 4]]}]},
        r"annotation 11: expected polygons .* at least 3 points",
    ),
    (
        {"annotations": [CAT, CAT | {"segmentation": [[1, 2, 3, 4, 5, None]]}]},
        r"annotation 12: expected points, two finite",
    ),
    ({"annotations": [CAT | {"segmentation": [[0] * 7]}]}, r"annotation 11: expected points, two"),
    ({"annotations": [CAT | {"category_id": 9}]}, r"annotation 11: its image or its category"),
    ({"annotations": [CAT | {"image_id": 9}]}, r"annotation 11: its image or its category"),
    ({"annotations": [CAT | {"image_id": [1]}]}, r"entry 1 of 'annotations': expected numbers"),
    ({"annotations": [{"category_id": 7}]}, r"entry 1 of 'annotations': expected an object with image_id, category_id"),
    (
        {"annotations": [CAT | {"segmentation": {"size": [8, 10], "counts": [3, 4]}}]},
        r"annotation 11: .*runs of 7 pixels for 8 x 10",
    ),
    ({"annotations": [CAT | {"segmentation": {"size": [8, 10], "counts": "é"}}]}, r"annotation 11: expected runs"),
    (
        {"annotations": [CAT | {"segmentation": {"size": [4, 4], "counts": [16]}}]},
        r"annotation 11: runs for 4 x 4 pixels",
    ),
    ({"images": [{"id": 1, "file_name": "none.png"}]}, r"its image 'none.png' is not at .*--images"),
    (
        {"images": [{"id": k, "file_name": f"{n}.png", "height": 9, "width": 10} for k, n in ((1, "a"), (2, "b"))]},
        r"outlines for an image of 9 x 10",
    ),
    ({"images": "a.png"}, r"expected an object with 'images' and 'annotations' and 'categories'"),
    ({"categories": [{"id": 7}]}, r"entry 1 of 'categories': expected an object with id, name"),
]


@pytest.mark.parametrize(("change", "message"), COCO_FAULTS)
def test_faults_of_coco_name_file_and_entry_and_nothing_is_written(change, message, tmp_path, segnet):
    annotations = change.pop("annotations", [CAT]) if "annotations" in change else [CAT]
    file = coco(tmp_path, annotations, **change)
    before = sorted(tmp_path.iterdir())
    failed = segnet("data", "convert", file, tmp_path / "new", "--val", "0.5")
    assert failed.code == 1
    assert re.search(rf"error: .*c\.json: .*{message}", failed.err), failed.err
    assert len(failed.err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


LABELME_FAULTS = [
    (
        lambda d: d.update(shapes=[{"label": "a", "points": [[1, 1], [2, 2]]}]),
        r"shape 1 \('a'\): a polygon of 2 points",
    ),
    (
        lambda d: d.update(shapes=[{"label": "a", "shape_type": "line", "points": [[1, 1], [2, 2]]}]),
        "shape 1 .*: a line of 2 points",
    ),
    (lambda d: d.update(shapes=[{"points": []}]), "shape 1: expected an object with a label"),
    (lambda d: d.update(shapes=[{"label": "a", "points": "x"}]), r"shape 1 \('a'\): expected points"),
    (
        lambda d: d.update(shapes=[rectangle("other", 0, 0, 3, 3)]),
        "label 'other' of a.png is not among background, a, b",
    ),
    (lambda d: d.update(imageHeight=10, imageWidth=8), "outlines for an image of 10 x 8 "),
    (lambda d: d.update(imagePath="lost.png"), "its image 'lost.png' is not at"),
    (lambda d: d.pop("shapes"), "expected an object with 'shapes'"),
]


@pytest.mark.parametrize(("change", "message"), LABELME_FAULTS)
def test_faults_of_labelme_name_file_and_entry_and_nothing_is_written(change, message, tmp_path, segnet):
    folder, labels = one(tmp_path, [rectangle("a", 0, 0, 3, 3)]), names_file(tmp_path / "classes.txt", ("a", "b"))
    document = json.loads((folder / "a.json").read_text())
    change(document)
    (folder / "a.json").write_text(json.dumps(document))
    before = sorted(tmp_path.iterdir())
    failed = segnet("data", "convert", folder, tmp_path / "new", "--labels", labels)
    assert failed.code == 1
    assert re.search(rf"a\.json: {message}", failed.err), failed.err
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_json_or_no_source_says_so(tmp_path, segnet):
    folder = one(tmp_path, [])
    (folder / "b.json").write_text('{"shapes": [')
    assert "b.json: is no JSON" in segnet("data", "convert", folder, tmp_path / "new").err
    (tmp_path / "empty").mkdir()
    assert "no data set in VOC layout" in segnet("data", "convert", tmp_path / "empty", tmp_path / "new").err


def test_faults_of_folders(tmp_path, segnet):
    folder, labels = write_folders(tmp_path / "set", samples(3)), names_file(tmp_path / "classes.txt")
    assert "give --labels or --colors" in segnet("data", "convert", folder, tmp_path / "new").err
    few = names_file(tmp_path / "few.txt", LABELS[:2])
    assert (
        "masks hold numbers that are no class"
        in segnet("data", "convert", folder, tmp_path / "new", "--labels", few).err
    )
    Image.new("L", (9, 9)).save(folder / "masks" / "1.png")
    failed = segnet("data", "convert", folder, tmp_path / "new", "--labels", labels)
    assert re.search(r"masks/1\.png: mask of \(9, 9\) \(height, width\), its image has \(48, 64\)", failed.err)
    (folder / "masks" / "1.png").unlink()
    failed = segnet("data", "convert", folder, tmp_path / "new", "--labels", labels)
    assert "images/1.png: has no counterpart in masks/" in failed.err
    assert not (tmp_path / "new").exists()


def test_photos_are_turned_upright_and_get_ids_that_lists_can_hold(tmp_path, segnet):
    (image, mask), *_ = samples(1)
    folder = write_labelme(tmp_path / "photos", [(image, mask)] * 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: stored turned the other way
    stored = Image.fromarray(np.rot90(image).copy())
    stored.save(folder / "photo 0.jpg", exif=exif, quality=95)
    Image.fromarray(image).save(folder / "photo 1.jpg", format="BMP")
    done = segnet(
        "data", "convert", folder, tmp_path / "new", "--val", "0.5", "--labels", names_file(tmp_path / "c.txt")
    )
    assert done.code == 0, done.err
    dataset = VOCDataset(tmp_path / "new", "trainval")
    assert dataset.ids == ("photo_0", "photo_1")
    for index in range(2):
        got, labels, _ = dataset.sample(index)
        np.testing.assert_array_equal(labels, mask)
        assert np.abs(got.astype(int) - image).mean() < 8
        assert dataset.image_path(index).suffix == ".png"
    (folder / "photo?1.json").write_bytes((folder / "photo 1.json").read_bytes())
    failed = segnet("data", "convert", folder, tmp_path / "other")
    assert "its id would be photo_1" in failed.err


def blocks():
    """(what it needs, its commands) of each shell block of the page."""
    found = re.findall(r"(?:<!-- needs: (.*?) -->\n\n)?```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [(needs, [line for line in text.splitlines() if line]) for needs, text in found]


def test_the_page_leads_from_photos_to_an_exported_network(tmp_path, segnet, monkeypatch):
    pictures = samples(8)
    write_labelme(tmp_path / "photos", pictures)
    monkeypatch.chdir(tmp_path)
    ran = []
    for needs, lines in blocks():
        if needs == "the network" or (needs.startswith("the extra") and not has_onnx()):
            continue
        for line in lines:
            words = shlex.split(line, comments=True)[1:]
            if "instances.json" in words or "folder" in words:
                continue  # the next test
            if words[0] == "report" and not has_report():
                continue
            if words[0] == "train":
                words = [re.sub(r"^(size|epochs|width)=.*", lambda m: f"{m[1]}={TINY[m[1]]}", word) for word in words]
                words += ["--set", "batch=2", "--set", "workers=0", "--device", "numpy"]
            done = segnet(*words)
            assert done.code == 0, (line, done.err)
            ran.append(words[0])
    assert ran[:5] == ["data", "data", "data", "train", "eval"]
    assert ("report" in ran) == has_report()
    assert (tmp_path / "own.onnx").exists() == has_onnx()
    assert VOCDataset("data", "train").names == ("background", *sorted(LABELS[1:]))
    assert (len(VOCDataset("data", "train")), len(VOCDataset("data", "val"))) == (6, 2)
    assert len(list(Path("pictures").glob("*_overlay.png"))) == 8


TINY = {"size": 32, "epochs": 1, "width": 0.0625}


def has_onnx():
    return all(map(find_spec, ("onnx", "onnxruntime")))


def has_report():
    return all(map(find_spec, ("jinja2", "matplotlib")))


@pytest.mark.parametrize("number", range(3))
def test_the_pages_other_sources(number, tmp_path, segnet, monkeypatch):
    (lines,) = [lines for _, lines in blocks() if any("instances.json" in line for line in lines)]
    line, pictures = lines[number], samples(5)
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "instances.json", pictures)
    names_file(tmp_path / "classes.txt")
    colours = voc_palette()
    rows = [f"{name} {' '.join(map(str, colours[k]))}" for k, name in (*enumerate(LABELS), (VOID, "void"))]
    (tmp_path / "colours.txt").write_text("\n".join(rows))
    write_folders(tmp_path / "folder", pictures, colours if "--colors" in line else None)
    done = segnet(*shlex.split(line, comments=True)[1:])
    assert done.code == 0, done.err
    dataset = VOCDataset("data", "trainval")
    assert sorted(dataset.names) == sorted(LABELS)
    for index, name in enumerate(dataset.ids):
        mask, expected = dataset.sample(index)[1], pictures[int(name)][1]
        for label, text in enumerate(LABELS):
            np.testing.assert_array_equal(mask == dataset.names.index(text), expected == label)
