"""Data sets in PASCAL VOC's layout: reading and checking, transforms, batches, caches, a synthetic sample.

Also here, each imported by its own name: `verify`, `download`, `conversion`, `polygons`, `contact_sheet`.
"""

from segnet_scratch.data.cache import open_dataset as open_dataset
from segnet_scratch.data.loader import Batch as Batch
from segnet_scratch.data.loader import Loader as Loader
from segnet_scratch.data.loader import epoch_order as epoch_order
from segnet_scratch.data.loader import in_background as in_background
from segnet_scratch.data.loader import ordered_map as ordered_map
from segnet_scratch.data.loader import sample_rng as sample_rng
from segnet_scratch.data.palette import VOC_CLASSES as VOC_CLASSES
from segnet_scratch.data.palette import VOID as VOID
from segnet_scratch.data.palette import indexed_picture as indexed_picture
from segnet_scratch.data.palette import save_indexed_png as save_indexed_png
from segnet_scratch.data.palette import voc_palette as voc_palette
from segnet_scratch.data.pictures import read_image as read_image
from segnet_scratch.data.pictures import read_mask as read_mask
from segnet_scratch.data.sample import SAMPLE_CLASSES as SAMPLE_CLASSES
from segnet_scratch.data.sample import draw_sample as draw_sample
from segnet_scratch.data.sample import write_sample as write_sample
from segnet_scratch.data.statistics import class_statistics as class_statistics
from segnet_scratch.data.transforms import IMAGENET_MEAN as IMAGENET_MEAN
from segnet_scratch.data.transforms import IMAGENET_STD as IMAGENET_STD
from segnet_scratch.data.transforms import ColourJitter as ColourJitter
from segnet_scratch.data.transforms import EvalTransform as EvalTransform
from segnet_scratch.data.transforms import TrainTransform as TrainTransform
from segnet_scratch.data.transforms import normalise as normalise
from segnet_scratch.data.transforms import resize_image as resize_image
from segnet_scratch.data.transforms import resize_mask as resize_mask
from segnet_scratch.data.voc import VOCDataset as VOCDataset
from segnet_scratch.data.voc import class_names as class_names
from segnet_scratch.data.voc import find_root as find_root
from segnet_scratch.data.voc import read_split as read_split
