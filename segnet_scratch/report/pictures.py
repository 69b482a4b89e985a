"""The pictures of a page as data URIs: an image, its ground truth, its prediction and where the two differ."""

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from segnet_scratch.data import VOID, VOCDataset, indexed_picture, resize_image, resize_mask
from segnet_scratch.data.palette import png_bytes
from segnet_scratch.evaluate import ImageScore
from segnet_scratch.inference import Segmenter, scaled

_WIDTH = 420  # pixels of a picture at most: twice what the page gives it, for fine screens and for print
_WRONG = np.array([214, 40, 40])


@dataclass(frozen=True)
class Example:
    """One image of the validation set on the page; its pictures are data URIs."""

    score: ImageScore
    image: str
    truth: str
    prediction: str
    errors: str


def example(score: ImageScore, index: int, dataset: VOCDataset, segmenter: Segmenter) -> Example:
    """Image, truth and prediction of a sample, made as small as the page needs them."""
    image, truth, _ = dataset.sample(index)
    found = segmenter(image).labels
    size = scaled(truth.shape, min(1.0, _WIDTH / truth.shape[1]))
    image, truth, found = resize_image(image, size), resize_mask(truth, size), resize_mask(found, size)
    wrong = (truth != found) & (truth != VOID)
    grey = 0.6 * image.mean(axis=2, keepdims=True) + 90  # pale, so that red stands out
    errors = np.where(wrong[..., None], _WRONG, np.where((truth == VOID)[..., None], 255, grey))
    right, predicted = (png_uri(indexed_picture(mask, dataset.palette)) for mask in (truth, found))
    return Example(score, jpeg_uri(image), right, predicted, jpeg_uri(np.rint(errors.clip(0, 255)).astype(np.uint8)))


def jpeg_uri(image: np.ndarray) -> str:
    """A photo, uint8 (h, w, 3), as a data URI."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def png_uri(picture: Image.Image) -> str:
    """A picture, without loss, as a data URI."""
    return f"data:image/png;base64,{b64encode(png_bytes(picture)).decode()}"
