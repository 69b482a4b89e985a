"""Pictures and a small data set made by hand, which several test files about data share."""

import hashlib
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from segnet_scratch import data
from segnet_scratch.data import VOID
from segnet_scratch.data.download.sources import Source


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, depth: int, colour_type: int, rows: bytes, palette: bytes = b"", extra: bytes = b""
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


def empty_voc(root: Path) -> Path:
    """The folders of a data set in VOC layout, with nothing in them."""
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    return root


def write_voc(root: Path) -> Path:
    """A small, healthy data set: ids a, b, c, ..., 8 images of 20 x 30 in split train, 2 of them in val."""
    empty_voc(root)
    ids = list("abcdefgh")
    for number, name in enumerate(ids):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(encoded(noise(seed=number), "JPEG"))
        mask = np.random.default_rng(number).integers(0, 21, (20, 30)).astype(np.uint8)
        mask[:2] = VOID
        data.save_indexed_png(root / "SegmentationClass" / f"{name}.png", mask)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    return root


def small_source(original: Source, archive: bytes) -> Source:
    """The source of an archive like the original's, but with this content, and nowhere to be had."""
    md5 = hashlib.md5(archive).hexdigest()
    return replace(original, md5=md5, size=len(archive), limit=1_000_000, room=0, urls=())
