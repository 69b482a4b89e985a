"""A data set that reads decoded samples from one file, mapped into memory."""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from segnet_scratch.data.loader import ordered_map
from segnet_scratch.data.memory_cache import Sample, shrunk
from segnet_scratch.data.voc import VOCDataset
from segnet_scratch.errors import DataError
from segnet_scratch.files import lock, reason, sweep_temporaries, write_durably
from segnet_scratch.runtime.cache import cache_directory

_MAGIC = b"SEGNETC1"
# At the end of the file, since what comes before is written as it is decoded: magic, bytes of the index, its SHA-256.
_TRAILER = struct.Struct("<8sQ32s")


class DiskCachedDataset(VOCDataset):
    """Reads samples from one file of decoded pixels, which is made at the first use and mapped into memory.

    folder: where the file lies; `data` in the user's cache folder unless given. Deleting it is always safe. The file
    is made anew whenever the list, the classes, size or time of any image or mask, `longest`, or Pillow and its
    decoders have changed, and where it is damaged; a reader finds the old file or the new one. Of several processes
    one makes it, the others wait. An image changed in place with its size and time kept goes unnoticed.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        folder: Path | None = None,
        longest: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__(path, split)
        self._longest = longest
        folder = folder or cache_directory() / "data"
        place = hashlib.sha256(json.dumps([str(self.root.resolve()), split, longest]).encode()).hexdigest()[:16]
        self.file = folder / f"{self.root.name}-{split}-{place}.segnet-cache"
        fingerprint = self._fingerprint()
        try:
            # Whoever finds it made needs no right to write there: several users may share a folder.
            index = _read_index(self.file, fingerprint, len(self))
            if index is None:
                folder.mkdir(parents=True, exist_ok=True)
                with _locked(folder / "lock"):
                    # Under the lock nobody else writes here, so whatever is half-written was left by a killed process.
                    sweep_temporaries(folder)
                    index = _read_index(self.file, fingerprint, len(self))
                    if index is None:
                        write_durably(self.file, self._blocks(fingerprint, progress))
                        index = _read_index(self.file, fingerprint, len(self))
            if index is None:
                raise DataError(f"{self.file}: does not hold what was written to it; check the disk.")
            self._index = index
            self._checked = bytearray(len(self))
            self._bytes = np.memmap(self.file, np.uint8, "r")
        except OSError as error:
            raise DataError(
                f"{self.file}: the cache of decoded images cannot be made: {reason(error)}; or set SEGNET_CACHE to "
                'a folder on another disk, or train with cache = "none".'
            ) from error

    def sample(self, index: int) -> Sample:
        """As VOCDataset, from the file; the arrays cannot be written to. DataError where the file is damaged."""
        offset, height, width, checksum = self._index[index]
        pixels = height * width
        stored = self._bytes[offset : offset + 4 * pixels]
        if not self._checked[index]:  # once a process: from then on it lies in the system's memory
            if zlib.crc32(stored.data) != checksum:
                raise DataError(f"{self.file}: damaged at sample '{self.ids[index]}'; delete the file.")
            self._checked[index] = 1
        image = stored[: 3 * pixels].reshape(height, width, 3).view(np.ndarray)
        return image, stored[3 * pixels :].reshape(height, width).view(np.ndarray), self.ids[index]

    def _fingerprint(self) -> str:
        """Everything that the decoded pixels depend on, as far as it can be told without reading the files."""
        digest = hashlib.sha256()
        decoders = [PIL.__version__, *(features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib"))]
        digest.update(json.dumps([_MAGIC.decode(), decoders, self.classes, self._longest]).encode())
        for index, name in enumerate(self.ids):
            states = [path.stat() for path in (self.image_path(index), self.mask_path(index))]
            facts = [(state.st_size, state.st_mtime_ns) for state in states]
            digest.update(json.dumps([name, self.image_path(index).suffix, facts]).encode())
        return digest.hexdigest()

    def _blocks(self, fingerprint: str, progress: Callable[[int, int], None]) -> Iterator[memoryview | bytes]:
        """The content of the file: images and masks, sample after sample; the index; the trailer."""
        samples, offset = [], 0
        workers = os.cpu_count() or 1

        def decode(index: int) -> Sample:
            return shrunk(VOCDataset.sample(self, index), self._longest)

        with closing(ordered_map(decode, range(len(self)), workers, ahead=4 * workers)) as results:
            for done, (image, mask, _) in enumerate(results, start=1):
                parts = [np.ascontiguousarray(array).reshape(-1).data for array in (image, mask)]
                yield from parts
                samples.append([offset, *mask.shape, zlib.crc32(parts[1], zlib.crc32(parts[0]))])
                offset += image.nbytes + mask.nbytes
                progress(done, len(self))
        index = json.dumps({"fingerprint": fingerprint, "samples": samples}).encode()
        yield index
        yield _TRAILER.pack(_MAGIC, len(index), hashlib.sha256(index).digest())


def _read_index(file: Path, fingerprint: str, samples: int) -> list[list[int]] | None:
    """[offset, height, width, checksum] of every sample; None where the file is missing, stale or damaged."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(size - _TRAILER.size)
            magic, length, digest = _TRAILER.unpack(stream.read())
            data = size - _TRAILER.size - length
            if magic != _MAGIC or data < 0:
                return None
            stream.seek(data)
            text = stream.read(length)
    except (OSError, struct.error):
        return None
    if hashlib.sha256(text).digest() != digest:
        return None
    index = json.loads(text)  # ours, by its checksum
    if index["fingerprint"] != fingerprint or len(index["samples"]) != samples:
        return None
    return index["samples"]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a cache folder, and waits for it."""
    with path.open("ab") as stream:
        lock(stream.fileno(), path, wait=True)
        yield
