"""Outlines that people draw round objects, LabelMe's and COCO's, as masks.

Coordinates are those of both formats: x to the right and y down from the upper left corner of the image, pixel (row r,
column c) being the square from (c, r) to (c + 1, r + 1). A pixel belongs to what its centre lies in.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.data.conversion import Pair
from segnet_scratch.data.palette import VOID
from segnet_scratch.errors import DataError
from segnet_scratch.files import reason, visible_files

_BACKGROUND = ("background", "_background_", "bg")
_VOID = ("void", "__ignore__")


Size = tuple[int, int]  # height, width
Shape = tuple[str, Callable[[Size], np.ndarray]]  # label of a region, and what tells, bool (H, W), where it lies


def read_labelme(
    folder: Path, labels: Sequence[str] | None = None, images: Path | None = None
) -> tuple[list[str], dict[str, Pair]]:
    """Names of the classes, and pairs by name, of a folder with LabelMe's JSON files; images in them are passed over.

    labels: the classes; those that occur, sorted, unless given. images: where images lie that are not at their
    `imagePath`. Shapes are drawn in the order of the file, as LabelMe draws them: the later covers the earlier.
    DataError names the file and the entry at fault.
    """
    found: dict[Path, tuple[Path, list[Shape], Size | None]] = {}
    for path in [file for file in visible_files(folder) if file.suffix.lower() == ".json"]:
        data = _read_json(path, "shapes")
        told = str(data.get("imagePath")).replace("\\", "/")
        image = _find_image(path, [path.parent / told, path.parent / Path(told).name], images, told)
        shapes = [_labelme_shape(f"{path}: shape {k}", entry) for k, entry in enumerate(data["shapes"], start=1)]
        found[path] = image, shapes, _size(data.get("imageHeight"), data.get("imageWidth"))
    names = _names(labels or sorted({label for _, shapes, _ in found.values() for label, _ in shapes}))
    return names, {path.stem: _pair(path, *item, names) for path, item in found.items()}


def read_coco(
    path: Path, labels: Sequence[str] | None = None, images: Path | None = None
) -> tuple[list[str], dict[str, Pair]]:
    """Names of the classes, and the pairs by name, of a COCO file of objects: polygons, or runs as numbers or text.

    labels: the classes; all categories by their numbers unless given. images: where the images lie, else beside the
    file or in `images` there. Crowds are drawn first, then the larger objects before the smaller, which stay visible on
    top. DataError names the file and the entry at fault.
    """
    data = _read_json(path, "images", "annotations", "categories")
    categories = {c["id"]: str(c["name"]) for c in _entries(path, data, "categories", "id", "name")}
    files = {entry["id"]: entry for entry in _entries(path, data, "images", "id", "file_name")}
    shapes: dict[Any, list[tuple[tuple[bool, float], Shape]]] = {key: [] for key in files}
    for entry in _entries(path, data, "annotations", "image_id", "category_id", "segmentation"):
        where = f"{path}: annotation {entry.get('id')}"
        if entry["image_id"] not in files or entry["category_id"] not in categories:
            raise DataError(f"{where}: its image or its category is not among those of the file.")
        area, inside = _coco_region(where, entry["segmentation"])
        rank = not entry.get("iscrowd"), -area
        shapes[entry["image_id"]].append((rank, (categories[entry["category_id"]], inside)))
    names = _names(labels or [name for _, name in sorted(categories.items())])
    pairs = {}
    for key, entry in files.items():
        told = str(entry["file_name"]).replace("\\", "/")
        image = _find_image(path, [path.parent / told, path.parent / "images" / told], images, told)
        ordered = [shape for _, shape in sorted(shapes[key], key=lambda item: item[0])]
        size = _size(entry.get("height"), entry.get("width"))
        pairs[str(Path(told).with_suffix(""))] = _pair(path, image, ordered, size, names)
    return names, pairs


def polygon_inside(points: np.ndarray, size: Size) -> np.ndarray:
    """Which pixels have their centre inside a polygon, points (n, 2) of x and y, by the even-odd rule: bool (H, W)."""
    height, width = size
    flips = np.zeros((height, width + 1), bool)  # where a row of centres crosses an edge
    for (x0, y0), (x1, y1) in pairwise(np.concatenate([points, points[:1]]) - 0.5):
        first, end = np.clip(np.ceil(sorted((y0, y1))), 0, height).astype(int)
        rows = np.arange(first, end)
        if len(rows):
            crossings = x0 + (rows - y0) * ((x1 - x0) / (y1 - y0))
            flips[rows, np.clip(np.ceil(crossings), 0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(flips[:, :width], axis=1)


def run_lengths(text: str) -> list[int]:
    """The numbers in COCO's compressed text: five bits a character, lowest first, from the fourth on differences."""
    runs: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 35:
            raise ValueError(f"the character {chr(code)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last of a number
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _labelme_shape(where: str, entry: Any) -> Shape:
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        raise DataError(f"{where}: expected an object with a label.")
    where, kind = f"{where} ({entry['label']!r})", entry.get("shape_type") or "polygon"
    points = _points(where, entry.get("points"))
    if kind == "circle" and len(points) == 2:
        (x, y), radius = points[0], hypot(*(points[1] - points[0]))
        return entry["label"], partial(_disc, x, y, radius)
    if kind == "rectangle" and len(points) in (2, 4):
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    elif kind != "polygon" or len(points) < 3:
        expected = "expected a polygon of 3 or more, a rectangle or circle of 2"
        raise DataError(f"{where}: a {kind} of {len(points)} points; {expected}.")
    return entry["label"], partial(polygon_inside, points)


def _coco_region(where: str, told: Any) -> tuple[float, Callable[[Size], np.ndarray]]:
    """Its area in pixels, and what tells where it lies."""
    if isinstance(told, dict):
        try:
            counts, (height, width) = told["counts"], told["size"]
            runs = np.array(run_lengths(counts) if isinstance(counts, str) else counts, np.int64)
            if runs.ndim != 1 or runs.min() < 0 or runs.sum() != height * width:
                raise ValueError(f"runs of {runs.sum()} pixels for {height} x {width}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}: expected runs as COCO writes them, counts and size, got {error}.") from error
        return float(runs[1::2].sum()), partial(_run_mask, where, runs, (height, width))
    if not isinstance(told, list) or not told or not all(isinstance(part, list) and len(part) > 5 for part in told):
        raise DataError(f"{where}: expected polygons [[x, y, x, y, x, y, ...], ...] of at least 3 points, or runs.")
    parts = [_points(where, part) for part in told]
    return sum(map(_area, parts)), lambda size: np.any([polygon_inside(points, size) for points in parts], axis=0)


def _pair(source: Path, image: Path, shapes: Sequence[Shape], told: Size | None, names: list[str]) -> Pair:
    """The image, and the mask that its regions make, the later covering the earlier; beside them is background."""
    labels = dict.fromkeys(_VOID, VOID) | dict.fromkeys(_BACKGROUND, 0) | {name: k for k, name in enumerate(names)}

    def drawn(size: Size) -> np.ndarray:
        if told and told != size:
            sizes = "an image of {} x {} (height x width); {} has {} x {}".format(*told, image, *size)
            raise DataError(f"{source}: outlines for {sizes}; take the image that they were drawn on.")
        mask = np.zeros(size, np.uint8)
        for label, inside in shapes:
            if label not in labels:
                raise DataError(f"{source}: label {label!r} of {image.name} is not among {', '.join(names)}; add it.")
            mask[inside(size)] = labels[label]
        return mask

    return Pair(image, drawn)


def _names(labels: Sequence[str]) -> list[str]:
    """The classes: background, then the labels but those that mean background or void."""
    return ["background", *(label for label in labels if label not in (*_BACKGROUND, *_VOID))]


def _disc(x: float, y: float, radius: float, size: Size) -> np.ndarray:
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= radius**2


def _run_mask(where: str, runs: np.ndarray, told: Size, size: Size) -> np.ndarray:
    """Runs go down the columns, one after the other; outside and inside take turns."""
    if told != size:
        raise DataError(f"{where}: runs for {told[0]} x {told[1]} pixels (height x width), the image has {size}.")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(told[::-1]).T


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _points(where: str, told: Any) -> np.ndarray:
    """(n, 2) of x and y."""
    try:
        points = np.array(told, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        points = np.full((1, 2), np.nan)
    if not np.isfinite(points).all():
        raise DataError(f"{where}: expected points, two finite numbers each.")
    return points


def _size(height: Any, width: Any) -> Size | None:
    return (height, width) if type(height) is int and type(width) is int else None


def _find_image(path: Path, places: list[Path], images: Path | None, told: str) -> Path:
    places = [images / told, images / Path(told).name] if images else places
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise DataError(f"{path}: its image {told!r} is not at {places[0]}; say with --images where the images lie.")


def _read_json(path: Path, *lists: str) -> dict[str, Any]:
    """What a JSON file holds; DataError where it is none, or not an object with these lists."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({error}); export it again.") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in lists):
        raise DataError(f"{path}: expected an object with {' and '.join(map(repr, lists))}, each a list.")
    return data


def _entries(path: Path, data: dict[str, Any], key: str, *needed: str) -> list[dict[str, Any]]:
    """A list of objects, each with what is needed of it; identifiers are numbers or texts."""
    for k, entry in enumerate(data[key], start=1):
        if not isinstance(entry, dict) or any(name not in entry for name in needed):
            raise DataError(f"{path}: entry {k} of {key!r}: expected an object with {', '.join(needed)}.")
        if any(not isinstance(entry[name], int | str) for name in needed if name.endswith("id")):
            raise DataError(f"{path}: entry {k} of {key!r}: expected numbers as identifiers.")
    entries: list[dict[str, Any]] = data[key]
    return entries
