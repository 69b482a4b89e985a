"""A small synthetic data set in VOC layout: shaded shapes on textured ground, for demos and tests.

A class is a shape and its hue. Hue, size, shading and ground vary from object to object, objects overlap,
and a void border of 2 px runs round each as in VOC. A small network learns it in minutes.
"""

import json
from collections.abc import Iterator
from colorsys import hsv_to_rgb
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from segnet_scratch.data.loader import sample_rng
from segnet_scratch.data.palette import VOID, save_indexed_png
from segnet_scratch.data.voc import FOLDERS, IMAGE_FOLDER, MASK_FOLDER, SPLIT_FOLDER
from segnet_scratch.errors import DataError
from segnet_scratch.files import left_by_system, reason

# Names of the classes, by label.
SAMPLE_CLASSES = ("background", "circle", "square", "triangle", "star", "ring")

_HUES = {"circle": 0.99, "square": 0.61, "triangle": 0.13, "star": 0.79, "ring": 0.41}
_HUE_JITTER = 0.035
_PRESENCE = 0.9  # of each class in each image: all classes in most images, yet none is always there
_SMALLEST = 48  # below this the void borders leave little of an object
_MARKER = "sample.json"
_MARKER_VERSION = 1  # raise it whenever the same settings give other pixels


def write_sample(
    directory: str | Path, train: int = 160, val: int = 40, size: tuple[int, int] = (96, 128), seed: int = 0
) -> Path:
    """Writes `train` + `val` images of `size` (height, width) and returns the VOC root, which is `directory`.

    Splits: train, val, trainval. The same settings give the same bytes (with the same Pillow). Image k
    depends on seed, size and k alone. The split files come last, so that what an interrupted run left
    behind is not taken for a data set; running again completes it, and does nothing where all is there.
    Raises DataError for settings out of range, for a folder that holds anything else, or that cannot be
    written.
    """
    root = Path(directory)
    if train < 1 or val < 1 or seed < 0:
        raise DataError(f"{root}: sample of {train} train and {val} val images, seed {seed}: expected 1, 1, 0 or more.")
    if len(size) != 2 or min(size) < _SMALLEST or max(size) > 4096:
        raise DataError(f"{root}: sample size {size}: expected (height, width), both in {_SMALLEST}..4096.")
    settings = {"version": _MARKER_VERSION, "train": train, "val": val, "size": list(size), "seed": seed}
    ids = [f"sample_{number:05d}" for number in range(train + val)]
    lists = {"train": ids[:train], "val": ids[train:], "trainval": ids}
    texts = {root / SPLIT_FOLDER / f"{split}.txt": members for split, members in lists.items()}
    pairs = [(root / IMAGE_FOLDER / f"{name}.jpg", root / MASK_FOLDER / f"{name}.png") for name in ids]
    names = root / "labels.txt"
    try:
        _claim(root, settings)
        if all(path.is_file() for path in (names, *texts, *chain(*pairs))):
            return root
        # The marker comes first: with it, what an interrupted run leaves is known as ours.
        root.mkdir(parents=True, exist_ok=True)
        (root / _MARKER).write_text(json.dumps(settings) + "\n", encoding="utf-8")
        for folder in FOLDERS:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for path in texts:
            path.unlink(missing_ok=True)
        for number, (image_path, mask_path) in enumerate(pairs):
            image, mask = draw_sample(size, sample_rng(seed, 0, number))
            Image.fromarray(image).save(image_path, format="JPEG", quality=92)
            save_indexed_png(mask_path, mask)
        for path, members in {names: SAMPLE_CLASSES, **texts}.items():
            path.write_text("\n".join(members) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{root}: the sample cannot be written: {reason(error)}.") from error
    return root


def draw_sample(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One synthetic image uint8 (H, W, 3) and its mask uint8 (H, W), labels by SAMPLE_CLASSES."""
    height, width = size
    rows, columns = (axis.astype(np.float32) + np.float32(0.5) for axis in np.mgrid[0:height, 0:width])
    image = _ground(rows, columns, rng)
    mask = np.zeros(size, np.uint8)
    for label, (middle_row, middle_column), radius in _arrangement(size, rng):
        shape = SAMPLE_CLASSES[label]
        y, x = (rows - middle_row) / radius, (columns - middle_column) / radius
        turn = rng.uniform(0, 2 * np.pi)
        # In pixels from here on: negative inside, so that edge, void border and shadow are thresholds of it.
        distance = radius * _outline(shape, x, y, turn)
        shadow = np.clip(1 - _outline(shape, x - 0.12, y - 0.12, turn) / 0.3, 0, 1) ** 2
        image *= 1 - 0.5 * shadow[:, :, None]
        cover = np.clip(0.5 - distance, 0, 1)[:, :, None]
        image += cover * (_surface(shape, x, y, rng) - image)
        mask[distance < -1] = label
        mask[np.abs(distance) <= 1] = VOID
    image += rng.normal(0, 0.012, image.shape)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), mask


def _claim(root: Path, settings: dict[str, object]) -> None:
    """Raises DataError unless `root` is free or holds this very sample."""
    if root.exists() and not (root.is_dir() and all(left_by_system(path.name) for path in root.iterdir())):
        try:
            found = json.loads((root / _MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{root}: holds something else than a sample; choose a new or an empty folder.") from error
        if found != settings:
            what = f"another sample ({found}) than the one asked for ({settings})"
            raise DataError(f"{root / _MARKER}: {what}; choose a new folder.")


def _arrangement(size: tuple[int, int], rng: np.random.Generator) -> Iterator[tuple[int, tuple[float, float], float]]:
    """Label, centre (row, column) and radius in pixels of each object, from the lowest to the topmost."""
    placed: list[np.ndarray] = []
    for label in rng.permutation(np.arange(1, len(SAMPLE_CLASSES))).tolist():
        if rng.random() >= _PRESENCE:
            continue
        # The freest of a few places: objects touch and overlap, but seldom hide one another.
        candidates = rng.uniform(0.1, 0.9, (3, 2)) * size
        gaps = [min((np.hypot(*(place - other)) for other in placed), default=0.0) for place in candidates]
        place = candidates[int(np.argmax(gaps))]
        placed.append(place)
        yield label, (float(place[0]), float(place[1])), float(rng.uniform(0.17, 0.27) * min(size))


def _outline(shape: str, x: np.ndarray, y: np.ndarray, turn: float) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1 turned by `turn` radians; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.85
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.26
    radii = {"square": [1.0] * 4, "triangle": [1.1] * 3, "star": [1.15, 0.52] * 5}[shape]
    angles = turn + 2 * np.pi * np.arange(len(radii)) / len(radii)
    corners = list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))
    squared = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
        squared = np.minimum(squared, (x - ax - along * (bx - ax)) ** 2 + (y - ay - along * (by - ay)) ** 2)
        # Even-odd rule: a ray to the right of the pixel leaves the shape once for every edge it crosses.
        crossed = ((ay <= y) != (by <= y)) & (((x - ax) * (by - ay) < (y - ay) * (bx - ax)) == (by > ay))
        inside ^= crossed
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _ground(rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two dull colours mixed by a pattern: float (H, W, 3) in [0, 1]."""
    dark, light = (
        np.array(hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.25), value))
        for value in (rng.uniform(0.3, 0.55), rng.uniform(0.6, 0.85))
    )
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    kind = rng.choice(["clouds", "gradient", "stripes", "waves"])
    if kind == "clouds":
        coarse = Image.fromarray(rng.random((5, 6)).astype(np.float32))
        height, width = rows.shape
        mix = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    elif kind == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        mix = np.clip(0.5 + 1.5 * np.sin(along * 2 * np.pi / rng.uniform(10, 26)), 0, 1)
    else:
        across = np.cos(angle) * rows - np.sin(angle) * columns
        mix = 0.5 + 0.5 * np.sin(along / 5 + 2 * np.sin(across / rng.uniform(6, 12)))
    return dark + np.clip(mix, 0, 1)[:, :, None] * (light - dark)


def _surface(shape: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The colour of an object, lit from the upper left, plain, striped or dotted: float (H, W, 3)."""
    hue = (_HUES[shape] + rng.uniform(-_HUE_JITTER, _HUE_JITTER)) % 1
    colour = np.array(hsv_to_rgb(hue, rng.uniform(0.65, 0.95), rng.uniform(0.7, 0.95)))
    light = 1 - 0.22 * (x + y)
    pitch = rng.uniform(9, 14)
    kind = rng.choice(["plain", "striped", "dotted"])
    if kind == "striped":
        light = light - 0.18 * (np.sin(pitch * (x + 0.6 * y)) > 0)
    elif kind == "dotted":
        light = light - 0.25 * (np.sin(pitch * x) * np.sin(pitch * y) > 0.45)
    return np.clip(light, 0.25, 1.4)[:, :, None] * colour
