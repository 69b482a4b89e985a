"""Reading images and masks, and refusing what is damaged, hostile or no mask at all."""

import logging
import re
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from segnet_scratch.data.findings import FoundError, Tell, refuse
from segnet_scratch.data.palette import VOID, says_nothing
from segnet_scratch.errors import DataError
from segnet_scratch.files import reason

# Larger pictures are refused before they are decoded: a file of some kB can claim to hold gigapixels.
MAX_PIXELS = 64_000_000

log = logging.getLogger(__name__)

Role = Literal["image", "mask"]

# A format that Pillow is not told to expect is never parsed, so a flaw in a rare decoder cannot be reached.
_FORMATS: dict[Role, tuple[str, ...]] = {"image": ("JPEG", "PNG"), "mask": ("PNG",)}
_PREDICTION_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_16_BIT = "I;16"  # and its variants; older versions of Pillow call 16-bit grey of a PNG I

# What EXIF's orientations 2 to 8 ask for; 1 is upright, and what is none of them is no orientation. Pillow's
# exif_transpose also writes the EXIF data anew, which may be damaged.
_TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
          6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}  # fmt: skip

# What people's data sets hold in place of pictures, by their first bytes.
_STARTS = {
    "is-png": rb"\x89PNG\r\n\x1a\n",
    "is-jpeg": rb"\xff\xd8\xff",
    "is-tiff": rb"II\*\0|MM\0\*",
    "is-gif": rb"GIF8",
    "is-bmp": rb"BM",
    "is-webp": rb"RIFF....WEBP",
    "is-lfs-pointer": rb"version https://git-lfs",
    "is-html": rb"(?i:<!doctype html|<html)",
}


def read_image(path: str | Path, *, for_prediction: bool = False, stream: BinaryIO | None = None) -> np.ndarray:
    """A picture as uint8 (H, W, 3), RGB; greyscale, palette and CMYK are converted, alpha is dropped.

    A data set's pictures are JPEG or PNG and are never turned by their EXIF orientation, because their
    masks are not. With `for_prediction` BMP, WebP and TIFF are read too and the picture is turned upright.
    A `stream` is read in place of the file, and the path only names it in messages.
    Raises DataError for a file that is missing, damaged, of another format or larger than MAX_PIXELS.
    """
    path = Path(path)
    picture = decode(path, "image", _PREDICTION_FORMATS if for_prediction else None, stream)
    if not (picture.mode in _MODES or _is_16_bit(picture)):
        raise FoundError("image-wrong-format", path, f"pixels of mode {picture.mode}; {_convert(path)}.")
    if for_prediction:
        turn, problem = orientation(picture)
        if problem:
            log.warning("%s: its EXIF data cannot be read (%s); the picture is taken as it is stored", path, problem)
        if turn != 1:
            picture = picture.transpose(_TURNS[turn])
    return rgb_pixels(picture)


def picture_bytes(path: Path) -> int:
    """What a picture takes when it is decoded, as its header says; 0 where nothing can be read."""
    try:
        with Image.open(path, formats=_PREDICTION_FORMATS) as picture:
            return 3 * picture.width * picture.height
    except Exception:  # reading it says what is wrong
        return 0


def orientation(picture: Image.Image) -> tuple[int, str]:
    """EXIF's orientation, 1 (upright) to 8, and what is wrong with the EXIF data: nothing, if it can be read.

    A value that is none of these, or no EXIF data that can be read, is upright.
    """
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # damaged EXIF is met with almost any type
        return 1, str(error) or type(error).__name__
    return (value if isinstance(value, int) and value in _TURNS else 1), ""


def read_mask(path: str | Path, classes: int) -> np.ndarray:
    """A mask as uint8 (H, W): palette indices (or grey values) as they are stored, each < `classes` or 255.

    Raises DataError for a file that is missing, damaged or not a PNG, for a colour-valued mask, and for
    a label that is neither a class nor void.
    """
    path = Path(path)
    mask = mask_labels(path, decode(path, "mask"))
    check_mask(path, mask, classes)
    return mask


def decode(
    path: Path, role: Role, formats: tuple[str, ...] | None = None, stream: BinaryIO | None = None
) -> Image.Image:
    """The decoded picture in the mode that it is stored in; `formats` as Pillow names them, or those of the role.

    A `stream` is read in place of the file. Whatever goes wrong becomes a FoundError, whose code begins with the role.
    """
    formats, start = formats or _FORMATS[role], b""
    if stream is None and not path.is_file():
        expected = f"expected a {' or '.join(formats)} picture there."
        if path.exists():
            raise FoundError(f"{role}-not-a-file", path, f"is a folder or a device; {expected}")
        if path.is_symlink():
            raise FoundError(
                f"{role}-link-broken", path, "is a link to nowhere; put the file there, or correct the link."
            )
        raise FoundError(f"missing-{role}", path, f"no such file; {expected}")
    try:
        with stream or path.open("rb") as stream:
            start = stream.read(32)
            picture = Image.open(stream, formats=formats)
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if picture.format == "PNG":
                # Decoding alone skips the checksums, so that a flipped bit would pass as another label.
                picture.verify()
                picture = Image.open(stream, formats=formats)
            picture.load()
            return picture
    except Exception as error:  # decoders meet damage with almost any type: SyntaxError, struct.error, ...
        code, detail = _fault(error, path, start, formats)
        raise FoundError(f"{role}-{code}", path, detail) from error


def rgb_pixels(picture: Image.Image) -> np.ndarray:
    """A decoded picture of any mode as uint8 (H, W, 3), RGB."""
    if _is_16_bit(picture):
        # 16-bit greyscale: Pillow's own conversion would clip everything above 255 to white.
        grey = (np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


def mask_labels(path: Path, picture: Image.Image) -> np.ndarray:
    """The numbers in a decoded mask, uint8 (H, W), as they are stored. FoundError for a mode that holds none."""
    if picture.mode not in ("P", "L", "1"):
        colours = picture.mode.startswith("RGB")
        code = "mask-rgb" if colours else "mask-has-alpha" if picture.mode.endswith("A") else "mask-16-bit"
        what, how = (", a colour-coded mask", " (segnet data convert does)") if colours else ("", "")
        got = f"expected class numbers as palette indices (PNG of mode P or L), got mode {picture.mode}{what}"
        fix = f"replace every colour by the number of its class and save it as an indexed PNG{how}"
        raise FoundError(code, path, f"{got}; {fix}.")
    mask = np.array(picture, dtype=np.uint8)
    if picture.mode == "L":
        # Greyscale of 2 or 4 bits a pixel comes out of Pillow stretched to 0..255; labels must not be.
        mask //= 255 // (2 ** min(_png_bit_depth(path), 8) - 1)
    return mask


def mask_colours(path: Path, classes: int) -> list[tuple[int, int, int]] | None:
    """The colours that a mask's palette gives the classes; None where it has none that mean something."""
    try:
        picture = decode(path, "mask")
    except DataError:  # whoever reads the mask is told
        return None
    palette = np.frombuffer(palette_of(picture), np.uint8).reshape(-1, 3)[:classes]
    distinct = len(set(map(bytes, palette))) == classes  # np.unique imports numpy.ma: 60 ms
    meant = distinct and not says_nothing(palette, range(classes))
    return [(int(r), int(g), int(b)) for r, g, b in palette] if meant else None


def label_counts(mask: np.ndarray) -> np.ndarray:
    """The number of pixels of each label of a mask, uint8 (H, W): int64 (256,)."""
    # Three times as fast as np.bincount, which widens the whole mask to 64 bits first.
    return np.array(Image.fromarray(mask).histogram(), np.int64)


def label_facts(mask: np.ndarray, picture: Image.Image) -> tuple[np.ndarray, dict[int, bytes]]:
    """`label_counts` of a mask, and the colour that its palette gives each label but void, which has many."""
    counts, palette = label_counts(mask), palette_of(picture)
    colours = {label: palette[3 * label : 3 * label + 3] for label in np.flatnonzero(counts[:VOID]).tolist()}
    return counts, {label: colour for label, colour in colours.items() if colour}


def check_mask(path: Path, mask: np.ndarray, classes: int, found: Tell = refuse) -> None:
    """Tells of a mask, uint8 (H, W), with labels that are neither < `classes` nor void."""
    wrong = (mask >= classes) & (mask != VOID)
    if wrong.any():
        row, column = (int(axis[0]) for axis in np.nonzero(wrong))
        label = int(mask[row, column])
        others = np.unique(mask[wrong]).size - 1
        places = f"in {np.count_nonzero(mask == label)} pixels, first at row {row}, column {column}"
        more = f", and {others} other wrong labels" if others else ""
        fix = "Correct the mask, or name every class in labels.txt." + _ways_out(path, label, classes)
        expected = f"expected 0..{classes - 1} or {VOID} (void)"
        found("label-out-of-range", path, f"label {label} {places}{more}; {expected}. {fix}")


def _ways_out(path: Path, label: int, classes: int) -> str:
    """What a label that is no class may mean, with the command that mends it."""
    root = path.parent.parent
    if label == VOID - 1 or label > classes:
        return f" If {label} is void: {convert_command(root, f'{label}=void')}"
    shift = ",".join(["0=void", *(f"{k}={k - 1}" for k in range(1, classes + 1))])
    return (
        f" If {label} is void, as where CamVid is in grey: {convert_command(root, f'{label}=void')} If numbers begin "
        f"at 1, and 0 is void: {convert_command(root, shift)}"
    )


def convert_command(root: Path, relabelling: str) -> str:
    """The command that gives the masks of a data set other numbers."""
    return f"segnet data convert {root} NEW --relabel '{relabelling}'."


def palette_of(picture: Image.Image) -> bytes:
    """The palette of a mask, three bytes a label; empty for one without."""
    return bytes(picture.getpalette("RGB") or ()) if picture.mode == "P" else b""


def _is_16_bit(picture: Image.Image) -> bool:
    return picture.mode.startswith(_16_BIT) or (picture.mode == "I" and picture.format == "PNG")


def _convert(path: Path) -> str:
    """How to make a picture of 8 bits a channel out of almost any format."""
    converted = path.with_name(f"{path.stem}-8bit.png")
    return f"convert it, for example by ImageMagick: magick '{path}[0]' -depth 8 '{converted}'"


def _fault(error: Exception, path: Path, start: bytes, formats: tuple[str, ...]) -> tuple[str, str]:
    """The code, less the role, of what decoding a file with this start has met, and what is said of it."""
    text = str(error).lower()
    match error:
        case UnidentifiedImageError() if not start:
            return "zero-bytes", "the file is empty (0 bytes); copy it from the source again."
        case UnidentifiedImageError():
            kind = next((kind for kind, first in _STARTS.items() if re.match(first, start, re.DOTALL)), "wrong-format")
            expected = f"not readable as {' or '.join(formats)} (the file starts with {start[:8]!r})"
            # The start of a picture that it should be, yet unreadable: its header is broken.
            code = "damaged" if kind.removeprefix("is-").upper() in formats else kind
            return code, f"{expected}; {_convert(path)}, or copy it from the source again."
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return "bomb", f"expected at most {MAX_PIXELS:,} pixels, got more; scale the picture down."
        case MemoryError():
            return "unreadable", "there is too little memory to decode it; end other programs."
        case OSError(errno=int()):  # of the system, not of the decoder
            return "unreadable", f"{reason(error)}."
    # PngImagePlugin's caps on text chunks, which a bomb made of metadata meets.
    bomb = "decompressed data too large" in text or "too much memory" in text
    code = "truncated" if "truncated" in text or isinstance(error, EOFError) else "bomb" if bomb else "damaged"
    return code, f"the picture is damaged or cut off ({error}); copy it from the source again."


def _png_bit_depth(path: Path) -> int:
    with path.open("rb") as stream:
        return stream.read(25)[24]  # signature 8, chunk length 4, "IHDR" 4, width 4, height 4
