"""Data sets in PASCAL VOC's layout: reading and checking, transforms, batches, caches, a synthetic sample.

Also here, each imported by its own name: `verify`, `download`, `convert_masks`, `polygons`, `contact_sheet`.
"""

from segnet_scratch.data.annotations import read_annotation
from segnet_scratch.data.cache import open_dataset
from segnet_scratch.data.loader import Batch, Loader, epoch_order, in_background, ordered_map, sample_rng
from segnet_scratch.data.palette import VOC_CLASSES, VOID, colourise, indexed_picture, save_indexed_png, voc_palette
from segnet_scratch.data.pictures import read_image, read_mask
from segnet_scratch.data.sample import SAMPLE_CLASSES, draw_sample, write_sample
from segnet_scratch.data.statistics import class_statistics
from segnet_scratch.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColourJitter,
    EvalTransform,
    TrainTransform,
    normalise,
    resize_image,
    resize_mask,
)
from segnet_scratch.data.voc import VOCDataset, class_names, find_root, read_split

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SAMPLE_CLASSES",
    "VOC_CLASSES",
    "VOID",
    "Batch",
    "ColourJitter",
    "EvalTransform",
    "Loader",
    "TrainTransform",
    "VOCDataset",
    "class_names",
    "class_statistics",
    "colourise",
    "draw_sample",
    "epoch_order",
    "find_root",
    "in_background",
    "indexed_picture",
    "normalise",
    "open_dataset",
    "ordered_map",
    "read_annotation",
    "read_image",
    "read_mask",
    "read_split",
    "resize_image",
    "resize_mask",
    "sample_rng",
    "save_indexed_png",
    "voc_palette",
    "write_sample",
]
