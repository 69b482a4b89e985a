"""The archives that can be downloaded: where they lie, what they must be, what is taken out of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from segnet_scratch.data.annotations import ANNOTATION_FOLDER
from segnet_scratch.data.voc import IMAGE_FOLDER, MASK_FOLDER, SPLIT_FOLDER


@dataclass(frozen=True)
class Source:
    """One archive.

    file: its name. md5, size (bytes): of the one true file. urls: where to get it, in the order of trying.
    prefix: the folder inside it that counts. wanted: suffix of the files taken, by their folder below prefix; all
    else is left out. limit: bytes beyond which these files are refused. room: bytes of disk that they end in.
    """

    file: str
    md5: str
    size: int
    urls: tuple[str, ...]
    prefix: str
    wanted: Mapping[str, str]
    limit: int
    room: int


VOC2012 = Source(
    file="VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    size=1_999_639_040,
    urls=(
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",  # VOC's own address, often down
        "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
        "https://pjreddie.com/media/files/VOCtrainval_11-May-2012.tar",
    ),
    prefix="VOCdevkit/VOC2012",
    # SegmentationObject (instances) and the lists of the other tasks stay where they are: nothing here reads them.
    wanted={IMAGE_FOLDER: ".jpg", MASK_FOLDER: ".png", ANNOTATION_FOLDER: ".xml", SPLIT_FOLDER.as_posix(): ".txt"},
    limit=2_000_000_000,
    room=2_000_000_000,
)

SBD = Source(
    file="benchmark.tgz",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    size=1_419_539_633,
    urls=(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    ),
    prefix="benchmark_RELEASE/dataset",
    wanted={"cls": ".mat", "img": ".jpg", "": ".txt"},
    limit=6_000_000_000,
    room=300_000_000,  # only masks are written, as PNG; the images are VOC's own
)
