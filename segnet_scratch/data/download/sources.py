"""The archives that can be downloaded: where they lie, what they must be, and what is taken out of them.

Taken are the files that are wanted, and nothing else: no link, no device, no path of an archive's choosing. The
checksum has been found right before. `tarfile` only parses here: names are matched against a list, contents are handed
out as bytes, and who takes them decides where they go.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from segnet_scratch.data.annotations import ANNOTATION_FOLDER
from segnet_scratch.data.loader import Progress, silent
from segnet_scratch.data.voc import IMAGE_FOLDER, MASK_FOLDER, SPLIT_FOLDER
from segnet_scratch.errors import DataError


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


def read_files(archive: Path, source: Source, progress: Progress = silent) -> Iterator[tuple[str, bytes]]:
    """Path below the source's prefix, with slashes, and content of each wanted file, in the archive's order.

    archive: tar or tar.gz. progress is told of the bytes of it that are read, and their number. The name of a wanted
    file consists of letters, digits, _ and -.

    Raises DataError for an archive that is damaged, for a link or device in place of a wanted file, and beyond the
    limit. Other entries are passed over, whatever they are. An archive cut off between two files looks whole.
    """
    folders = {re.escape(f"{folder}/".lstrip("/")): re.escape(suffix) for folder, suffix in source.wanted.items()}
    shapes = [f"{folder}[A-Za-z0-9_-]+{suffix}" for folder, suffix in folders.items()]
    pattern = re.compile(rf"(?:\./)?{re.escape(source.prefix)}/({'|'.join(shapes)})")
    total, taken = archive.stat().st_size, 0
    try:
        # "r|" reads strictly forward: no header can send it back, so that it would never end.
        with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
            for member in tar:
                if match := pattern.fullmatch(member.name):
                    taken += member.size
                    reader = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                    if reader is None or taken > source.limit:
                        limit = f"together they have over {source.limit:,} bytes"
                        raise tarfile.ReadError(f"{member.name} is no file, or {limit}")
                    content = reader.read()
                    if len(content) != member.size:
                        raise tarfile.ReadError(f"{member.name} ends early")
                    yield match[1], content
                progress(raw.tell(), total)
    # Headers are met with almost any of these, chains of them with RecursionError.
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{archive}: the archive is damaged ({error}); delete it and download it again.") from error
