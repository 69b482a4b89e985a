"""Decoded samples kept for the next epoch, in memory or on disk: what a training run's setting `cache` means.

Decoding a JPEG and a PNG takes some milliseconds a sample and gives the same pixels every epoch. Both caches hold
uint8 and return exactly what VOCDataset does, as arrays that cannot be written to.
"""

import hashlib
import json
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from segnet_scratch.data.voc import VOCDataset
from segnet_scratch.errors import DataError
from segnet_scratch.files import reason, write_durably
from segnet_scratch.runtime.cache import cache_directory

# Bytes that a cache takes at most, unless told otherwise: some 5,000 samples of VOC's size.
MEMORY_LIMIT = 4 << 30

_DIGEST = hashlib.sha256().digest_size

# Image uint8 (H, W, 3), mask uint8 (H, W), id.
Sample = tuple[np.ndarray, np.ndarray, str]


def open_dataset(path: str | Path, split: str, cache: str) -> VOCDataset:
    """The split of a data set, read through a cache where one is asked for. Raises DataError as VOCDataset does."""
    kinds = {"none": VOCDataset, "device": VOCDataset, "memory": MemoryCachedDataset, "disk": DiskCachedDataset}
    return kinds[cache](path, split)


class MemoryCachedDataset(VOCDataset):
    """Keeps what was decoded, up to `limit` bytes; what comes after that is decoded every time.

    Nothing is ever dropped for something newer: an epoch takes every sample once, in a new order, so which samples
    are kept makes no difference, and exchanging them would only cost.
    """

    def __init__(self, path: str | Path, split: str, limit: int = MEMORY_LIMIT) -> None:
        super().__init__(path, split)
        self.held = 0  # bytes
        self._limit = limit
        self._kept: dict[int, Sample] = {}
        self._lock = threading.Lock()

    def sample(self, index: int) -> Sample:
        """As VOCDataset, from memory where it is there; the arrays cannot be written to."""
        if index in self._kept:
            return self._kept[index]
        sample = image, mask, _ = super().sample(index)
        for array in (image, mask):
            array.flags.writeable = False
        with self._lock:
            size = image.nbytes + mask.nbytes
            if index not in self._kept and self.held + size <= self._limit:
                self._kept[index] = sample
                self.held += size
        return sample


class DiskCachedDataset(VOCDataset):
    """Keeps each decoded sample in a file, in `data` in the user's cache folder; deleting one is always safe.

    A file begins with the digest of its pixels and of what they depend on: it is made anew, whole or not at all, when
    the classes, the size or time of image or mask, or Pillow and its decoders have changed, and where it is damaged.
    An image changed in place with its size and time kept goes unnoticed. The splits of a data set share the files.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        super().__init__(path, split)
        place = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:16]
        self.folder = cache_directory() / "data" / f"{self.root.name}-{place}"
        self._decoders = [PIL.__version__, *(features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib"))]

    def sample(self, index: int) -> Sample:
        """As VOCDataset, from the file; the arrays cannot be written to."""
        name, made_of = self.ids[index], self._made_of(index)
        file = self.folder / f"{name}.sample"
        try:
            content = file.read_bytes() if file.is_file() else b""
            digest, pixels = content[:_DIGEST], content[_DIGEST:]
            if digest != hashlib.sha256(made_of + pixels).digest():
                stored = BytesIO()
                for array in super().sample(index)[:2]:
                    np.save(stored, array)
                pixels = stored.getvalue()
                self.folder.mkdir(parents=True, exist_ok=True)
                write_durably(file, [hashlib.sha256(made_of + pixels).digest(), pixels], synced=False)
        except OSError as error:
            fix = 'or set SEGNET_CACHE to a folder on another disk, or train with cache = "none"'
            raise DataError(f"{file}: the cache of decoded images cannot be kept: {reason(error)}; {fix}.") from error
        stream = BytesIO(pixels)
        image, mask = np.load(stream), np.load(stream)
        image.flags.writeable = mask.flags.writeable = False
        return image, mask, name

    def _made_of(self, index: int) -> bytes:
        """Everything that the decoded pixels depend on, as far as it can be told without reading the files."""
        paths = self.image_path(index), self.mask_path(index)
        facts = [(path.suffix, state.st_size, state.st_mtime_ns) for path in paths for state in (path.stat(),)]
        return json.dumps([self._decoders, self.classes, facts]).encode()
