"""From a picture and its mask to what the network takes: size, crop, flip, colours, normalisation.

Image and mask always go through the same geometry. Masks are resized by nearest neighbour only, since a
value between two labels is a third class.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from segnet_scratch.data.palette import VOID
from segnet_scratch.errors import DataError, DTypeError, ShapeError

# Mean of ImageNet's RGB in [0, 1]: what the VGG16 weights were trained with.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)

# Standard deviation of ImageNet's RGB in [0, 1].
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalise(image: np.ndarray) -> np.ndarray:
    """(image / 255 - mean) / std per channel: uint8 (H, W, 3) RGB -> float32 (H, W, 3).

    Raises DTypeError or ShapeError for anything but such an image (a float image may be in [0, 1]
    already, and scaling it twice would go unnoticed).
    """
    _check_pixels("image", image, (3,))
    scaled = image.astype(np.float32)
    scaled /= 255
    scaled -= IMAGENET_MEAN
    scaled /= IMAGENET_STD
    return scaled


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (*size, 3), size (height, width); bilinear, antialiased when it shrinks.

    Raises DTypeError or ShapeError for another kind of array and DataError for a size that is not positive.
    """
    _check_pixels("image", image, (3,))
    _check_size(size)
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) -> uint8 of `size` (height, width); nearest neighbour, so that no new label appears.

    Raises DTypeError or ShapeError for another kind of array and DataError for a size that is not positive.
    """
    _check_pixels("mask", mask)
    _check_size(size)
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


@dataclass(frozen=True)
class View:
    """How a sample is seen: resized to `scaled` (height, width), mirrored if `flip`, from (top, left) on.

    A negative place is outside the picture.
    """

    scaled: tuple[int, int]
    top: int = 0
    left: int = 0
    flip: bool = False


@dataclass(frozen=True)
class ColourJitter:
    """Random brightness, contrast, saturation and hue, in this order; a strength of 0 leaves its part alone.

    brightness, contrast, saturation: in [0, 1]; each factor is drawn uniformly from [1 - strength, 1 + strength].
    Contrast moves colours to or from the image's mean grey, saturation to or from each pixel's own grey.
    hue: in [0, 0.5]; the hue turns by a share of the colour circle drawn uniformly from [-hue, hue].
    Raises DataError for a strength out of range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, strength in vars(self).items():
            if not 0 <= strength <= (highest := 0.5 if name == "hue" else 1):
                raise DataError(f"{name} {strength}: expected 0 (off) to {highest}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 (H, W, 3) -> the same, in other colours."""
        # Always four draws, so that one setting does not change what another one draws.
        *factors, turn = 2 * rng.random(4) - 1
        strengths = (self.brightness, self.contrast, self.saturation)
        if not any((*strengths, self.hue)):
            return image
        picture = Image.fromarray(image)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, strength, factor in zip(enhancers, strengths, factors, strict=True):
            if strength:
                picture = enhancer(picture).enhance(1 + strength * factor)
        return _turn_hue(picture, self.hue * turn) if self.hue else np.array(picture)


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop and horizontal flip, the same for image and mask, and random colours.

    size: (height, width) of the result. The picture is resized to `size` times a factor drawn uniformly
    from `scale`, flipped with probability 1/2 if `flip`, and cropped to `size` at a random place. Where
    the scaled picture is smaller than `size`, it is placed at random and padded: the image with the mean
    colour (0 after normalisation), the mask with void.
    short_side: (low, high); if given, the picture is resized so that its shorter side has a length drawn from
    low..high pixels and its aspect is kept, and `scale` is not used.
    Raises DataError for a size, scale or side that is not positive.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.5)
    flip: bool = True
    short_side: tuple[int, int] | None = None
    jitter: ColourJitter = ColourJitter()

    def __post_init__(self) -> None:
        _check_size(self.size)
        low, high = self.scale
        if not 0 < low <= high <= 16:
            raise DataError(f"scale ({low}, {high}): expected 0 < low <= high <= 16; (1, 1) turns scaling off.")
        if self.short_side and not 0 < self.short_side[0] <= self.short_side[1]:
            raise DataError(f"short_side {self.short_side}: expected (low, high) with 0 < low <= high.")

    def view(self, rng: np.random.Generator, shape: tuple[int, ...]) -> View:
        """What this transform draws for a sample whose picture has the shape (height, width)."""
        # Always four draws, so that one setting does not change what another one draws.
        draw_scale, draw_top, draw_left, draw_flip = rng.random(4)
        height, width = self.size
        scaled = self._scaled(shape, draw_scale)
        top, left = _place(scaled[0], height, draw_top), _place(scaled[1], width, draw_left)
        return View(scaled, top, left, self.flip and bool(draw_flip < 0.5))

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """image uint8 (H, W, 3), mask uint8 (H, W) -> float32 normalised (*size, 3), uint8 `size`."""
        _check_pair(image, mask)
        view = self.view(rng, mask.shape)
        height, width = self.size
        image, mask = resize_image(image, view.scaled), resize_mask(mask, view.scaled)
        if view.flip:
            image = image[:, ::-1]
            mask = mask[:, ::-1]
        from_rows, to_rows = _window(view.scaled[0], height, view.top)
        from_columns, to_columns = _window(view.scaled[1], width, view.left)
        pixels = np.zeros((height, width, 3), np.float32)
        labels = np.full((height, width), VOID, np.uint8)
        pixels[to_rows, to_columns] = normalise(self.jitter(image[from_rows, from_columns], rng))
        labels[to_rows, to_columns] = mask[from_rows, from_columns]
        return pixels, labels

    def _scaled(self, shape: tuple[int, ...], draw: float) -> tuple[int, int]:
        """(height, width) that a picture of this shape is resized to; `draw` in [0, 1) chooses in the range."""
        if self.short_side:
            low, high = self.short_side
            (height, width), factor = shape, (low + int(draw * (high - low + 1))) / min(shape)
        else:
            least, most = self.scale
            (height, width), factor = self.size, least + (most - least) * draw
        return max(1, round(height * factor)), max(1, round(width * factor))


@dataclass(frozen=True)
class EvalTransform:
    """Resizes image and mask to `size` (height, width); nothing is random.

    Right for a quick validation in batches. A score by VOC's protocol is taken at the size of the ground
    truth: resize the logits to the mask that `VOCDataset.sample` returns instead.
    Raises DataError for a size that is not positive.
    """

    size: tuple[int, int]

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """image uint8 (H, W, 3), mask uint8 (H, W) -> float32 normalised (*size, 3), uint8 `size`."""
        _check_pair(image, mask)
        return normalise(resize_image(image, self.size)), resize_mask(mask, self.size)


def _turn_hue(picture: Image.Image, share: float) -> np.ndarray:
    """The picture with every hue turned by a share of the colour circle, which Pillow cuts into 256 parts."""
    hue, saturation, value = picture.convert("HSV").split()
    turn = round(share * 256)
    turned = hue.point([(part + turn) % 256 for part in range(256)])
    return np.array(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


def _place(available: int, wanted: int, draw: float) -> int:
    """Where the result begins in the picture, negative where it begins before; `draw` in [0, 1) chooses among all."""
    offset = int(draw * (abs(available - wanted) + 1))
    return offset if available >= wanted else -offset


def _window(available: int, wanted: int, place: int) -> tuple[slice, slice]:
    """Where to read and where to write along one axis, for a result that begins at `place`."""
    first, last = max(0, place), min(available, place + wanted)
    return slice(first, last), slice(first - place, last - place)


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise DataError(f"size {size}: expected (height, width), both at least 1.")


def _check_pixels(what: str, array: np.ndarray, channels: tuple[int, ...] = ()) -> None:
    """DTypeError or ShapeError unless these are uint8 (H, W, *channels), one at least."""
    expected = f"{what}: expected uint8 (H, W{', 3' if channels else ''}), got {array.dtype} {array.shape}"
    if array.dtype != np.uint8:
        raise DTypeError(f"{expected}; pass it as it was read, by read_image or read_mask.")
    if array.ndim != 2 + len(channels) or array.shape[2:] != channels or array.size == 0:
        raise ShapeError(f"{expected}; pass one {what} at a time.")


def _check_pair(image: np.ndarray, mask: np.ndarray) -> None:
    """ShapeError or DTypeError unless these are an image uint8 (H, W, 3) and a mask uint8 (H, W) of one size."""
    _check_pixels("image", image, (3,))
    _check_pixels("mask", mask)
    if image.shape[:2] != mask.shape:
        raise ShapeError(f"image {image.shape} and mask {mask.shape} differ in size; pass the mask of this image.")
