"""A training batch from decoded pictures of any size, on the device: scaled, flipped, cropped or padded, normalised."""

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.ops.op import VOID, Buffers, Op, Spec, expect, expect_array, spec
from segnet_scratch.runtime.launch import ElementTypes


class AugmentForward(Op):
    """y (n, *size, 3) and labels uint8 (n, *size) of n pictures that lie one after the other in `images` and `masks`.

    images uint8 (pixels, 3); masks uint8 (pixels); starts int64 (n): each picture's first pixel; sizes int32 (n, 2):
    height, width; views int32 (n, 5): scaled height and width, top, left, flip; tones (n, 2): contrast, brightness;
    channels (2, 3): mean and standard deviation. What each does is written in augment.cu. Whoever makes these tables
    answers for them (data/on_device.py does): a start beyond the buffers would be read.
    """

    name, over = "augment_forward", "labels"

    def __init__(self, n: int, pixels: int, size: tuple[int, int], dtype: DTypeLike = np.float32) -> None:
        expect(
            min(n, pixels, *size) > 0, f"augment: {n} samples of {pixels} pixels to size {size}; expected none empty"
        )
        self.n, self.pixels, self.size = n, pixels, size
        tones = spec((n, 2), dtype)
        expect_array(self.name, "tones", tones)
        self.inputs = {
            "images": spec((pixels, 3), np.uint8),
            "masks": spec((pixels,), np.uint8),
            "starts": spec((n,), np.int64),
            "sizes": spec((n, 2), np.int32),
            "views": spec((n, 5), np.int32),
            "tones": tones,
            "channels": tones.with_shape(2, 3),
        }
        self.outputs = {"y": tones.with_shape(n, *size, 3), "labels": Spec((n, *size), np.dtype(np.uint8))}
        self.flops = 10 * max(self.outputs["y"].size, 3 * pixels)  # every pixel of what is seen is weighted once

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.of(self.inputs["tones"].dtype)

    def reference(self, b: Buffers) -> None:
        b.y[...], b.labels[...] = 0, VOID
        mean, std = b.channels
        for i, (start, (h, w)) in enumerate(zip(b.starts, b.sizes, strict=True)):
            picture = b.images[start : start + h * w].reshape(h, w, 3).astype(b.y.dtype)
            mask = b.masks[start : start + h * w].reshape(h, w)
            sh, sw, top, left, flip = (int(k) for k in b.views[i])
            rows, columns = np.arange(self.size[0]) + top, np.arange(self.size[1]) + left
            to_rows, to_columns = (np.flatnonzero((at >= 0) & (at < end)) for at, end in ((rows, sh), (columns, sw)))
            where = np.ix_(to_rows, to_columns)
            rows, columns = rows[to_rows], columns[to_columns]
            columns = sw - 1 - columns if flip else columns
            down, across = _triangles(rows, h, sh, b.y.dtype), _triangles(columns, w, sw, b.y.dtype)
            seen = np.einsum("rh,hwk,cw->rck", down, picture, across, optimize=True) / 255
            contrast, brightness = b.tones[i]
            toned = np.clip(contrast * (seen - 0.5) + 0.5 + brightness, 0, 1)
            b.y[i][where] = (toned - mean) / std
            b.labels[i][where] = mask[np.ix_(_nearest(rows, h, sh), _nearest(columns, w, sw))]


def _triangles(positions: np.ndarray, source: int, scaled: int, dtype: np.dtype) -> np.ndarray:
    """How much each source pixel counts for each position of the scaled picture: (positions, source), rows sum to 1."""
    scale = source / scaled
    centres = (positions + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - centres[:, None]) / max(1.0, scale))
    return (weights / weights.sum(1, keepdims=True)).astype(dtype)


def _nearest(positions: np.ndarray, source: int, scaled: int) -> np.ndarray:
    return (2 * positions + 1) * source // (2 * scaled)
