"""Checkpoints: safetensors files that survive a kill, a full disk and a damaged disk, and never run code.

The safetensors library reads and writes the format. Ours is what it leaves out: a save that is atomic and
durable, and a SHA-256 of the content, because the format itself accepts a flipped data bit.
"""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from segnet_scratch.errors import CheckpointError

FORMAT = "1"

_Path = str | os.PathLike[str]
# One entry holds everything of ours: safetensors writes several in no fixed order, and files would differ.
_KEY = "segnet_scratch"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.segnet-tmp")

_MAX_HEADER = 4 << 20
# NumPy's types by safetensors' names. NumPy has no bfloat16: it is read as the integer of its bits.
_DTYPES = {"BOOL": "?", "BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
_DTYPES |= {"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_DTYPES |= {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; its tensors are writable."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]


def save(path: _Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, object]) -> None:
    """Write a checkpoint atomically and durably: once it returns, a power failure does not lose it.

    The metadata is any mapping that JSON can hold (finite numbers, text keys); it comes back as JSON gives it,
    tuples as lists. The same content gives the same bytes. For a moment it takes the tensors' memory twice again.

    Raises CheckpointError for content that the file cannot hold, and when the system refuses to write. The old
    file then stays, complete; the new one stands there where only the last call, the sync of the directory, failed.
    """
    try:
        arrays = {name: _to_disk_order(name, array) for name, array in tensors.items()}
        plain = json.loads(json.dumps(dict(metadata), allow_nan=False))
        write_durably(Path(path), [safetensors.numpy.save(arrays, {_KEY: _record(plain, arrays)})])
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be saved: {error.strerror}; the file there, if any, is complete. Make room or "
            "correct the permissions, then continue with --resume."
        ) from error
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be saved: {error}; give NumPy arrays of numbers of up to 64 bits, and metadata that "
            "JSON can hold, without NaN or infinity."
        ) from error


def load(path: _Path) -> Checkpoint:
    """Read and verify a checkpoint; CheckpointError where it is missing, damaged in any bit or not of `save`."""
    with _opened(path) as file:
        record, metadata = _our_metadata(file)
        tensors = file.tensors()
        if _record(metadata, tensors) != record:
            raise ValueError("damaged content, which does not match its checksum")
        return Checkpoint(tensors, metadata)


def read_metadata(path: _Path) -> dict[str, Any]:
    """The metadata of a checkpoint from its header alone, so without the checksum; CheckpointError as in `load`."""
    with _opened(path) as file:
        return _our_metadata(file)[1]


def load_foreign(path: _Path) -> dict[str, np.ndarray]:
    """The tensors of any safetensors file, bfloat16 as float32; CheckpointError where missing, cut off, malformed."""
    fix = "get it anew, or convert it to safetensors where it is a PyTorch file, which can run code when it is read"
    with _opened(path, fix) as file:
        return file.tensors()


def sweep_temporaries(directory: _Path) -> list[Path]:
    """Remove the temporaries that killed saves left in a directory, and return their paths.

    A save in progress has one too: call it where nobody else writes to the directory. Raises CheckpointError for
    a directory that cannot be read or a temporary that cannot be removed.
    """
    try:
        files = sorted(file for file in Path(directory).iterdir() if file.is_file() and not file.is_symlink())
        orphans = [file for file in files if _TEMPORARY.fullmatch(file.name)]
        for orphan in orphans:
            orphan.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: leftovers of an interrupted save could not be removed: {error.strerror}; check "
            "the path and its permissions."
        ) from error
    return orphans


def write_durably(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Replace a file by the given bytes; a reader, also after a crash, finds the old file or the new one.

    The order is what makes it hold: write a temporary, sync it, rename it over the file, sync the directory. A
    rename that reached the disk before the data would leave an empty file after a power failure. Raises OSError.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.segnet-tmp"
    # Opened first: a directory that cannot be opened must be noticed while the old file is still in place.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        _write_synced(temporary, blocks)
        temporary.replace(path)
        try:
            os.fsync(directory)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the answer of network file systems that cannot sync a directory
                raise
    except BaseException:
        # The first error is the one to report; a leftover is swept at the next start.
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(directory)


def _write_synced(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for block in blocks:
            rest = memoryview(block)
            while rest.nbytes:  # one call may write less than it is given, always so beyond 2 GiB
                written = os.write(descriptor, rest)
                if written == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
                rest = rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_disk_order(name: str, array: np.ndarray) -> np.ndarray:
    """The array, contiguous and little-endian: safetensors takes the memory as it lies."""
    # A control character has several spellings in JSON: a flipped bit of the header could go unnoticed.
    if not isinstance(name, str) or not name.isprintable() or name == "__metadata__":
        raise ValueError(f"expected tensor names of printable characters, got {name!r}")
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        got = getattr(array, "dtype", type(array))
        raise ValueError(f"tensor {name}: expected a NumPy array of numbers, got {got}")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _record(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Format, metadata and checksum of a checkpoint, in the one spelling that `load` accepts."""
    digest = hashlib.sha256(json.dumps([FORMAT, metadata], sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        # Name, dtype and shape tell how many bytes follow, so no two contents feed the digest alike.
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return json.dumps({"format": FORMAT, "metadata": metadata, "sha256": digest.hexdigest()}, sort_keys=True)


def _our_metadata(file: "_File") -> tuple[str, dict[str, Any]]:
    """The record of a file written by `save` as it stands there, and the metadata in it."""
    text = file.metadata.get(_KEY)
    if text is None:
        raise ValueError("a file that was not written by this project")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("metadata"), dict):
        raise ValueError("metadata that is no JSON object")
    if record.get("format") != FORMAT:
        raise ValueError(f"format {record.get('format')!r:.40}, not {FORMAT}")
    return text, record["metadata"]


class _File:
    """An open safetensors file: what safetensors found in its header, and the data, read as a file.

    The library maps the files that it opens, and a file that somebody truncates while it is mapped (`cp` over a
    checkpoint does) ends the process with SIGBUS. Parsing the whole content from memory would need that memory twice.
    So the library gets a copy of the header alone, in front of a hole as long as the data.
    """

    def __init__(self, file: BinaryIO) -> None:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
        length = int.from_bytes(start, "little")
        # The library takes up to 100 MB of header, and seconds and a gigabyte to read it; 2,000 tensors need 0.2 MB.
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes, more than {_MAX_HEADER}")
        self._file = file
        with NamedTemporaryFile() as copy:
            copy.write(start + file.read(min(length, size)))  # Python makes room for as much as it is asked to read
            copy.truncate(size)
            copy.flush()
            with safe_open(copy.name, "np") as header:
                self.metadata: dict[str, str] = header.metadata() or {}
                # In the order of their data: the library refuses overlaps and holes, so one begins where another ends.
                slices = {name: header.get_slice(name) for name in header.offset_keys()}
                self._layout = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors by name; to be called once."""
        return {name: self._read(name, *layout) for name, layout in self._layout.items()}

    def _read(self, name: str, dtype: str, shape: list[int]) -> np.ndarray:
        if dtype not in _DTYPES:
            raise ValueError(f"tensor {name[:80]} of {dtype}, which NumPy has not")
        try:
            array = np.empty(shape, _DTYPES[dtype])
        except ValueError as error:  # too many sides, or an empty tensor whose other sides overflow its size
            raise ValueError(f"tensor {name[:80]}, which NumPy cannot hold: {error}") from error
        if self._file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
            raise ValueError("data that ends too early: it was cut off while it was read")
        if dtype != "BF16":
            return array
        bits = array.astype("<u4")
        bits <<= 16  # bfloat16 is the upper half of a float32
        return bits.view("<f4")


@contextmanager
def _opened(path: _Path, fix: str = "") -> Iterator[_File]:
    """The file, its header verified by safetensors; errors inside become CheckpointErrors with name and fix."""
    path = Path(path)
    try:
        # Also keeps a named pipe from being opened, which would wait for ever.
        if path.exists() and not path.is_file():
            raise ValueError("a directory or a device")
        with path.open("rb") as file:
            yield _File(file)
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        got = getattr(error, "strerror", None) or str(error)
        # It may quote a hostile name: a megabyte long, or with control sequences for the terminal.
        got, fix = ascii(got)[1:-1][:300], fix or _way_out(path)
        raise CheckpointError(f"{path}: expected a sound safetensors file, got: {got}; {fix}.") from None


def _way_out(path: Path) -> str:
    others = []
    with suppress(OSError):  # a folder that may not be searched has no other checkpoint to offer
        names = {"last.safetensors", "best.safetensors"} - {path.name}
        others = [str(path.parent / name) for name in sorted(names) if (path.parent / name).is_file()]
    return f"use {' or '.join(others) or 'another copy of it'}, or train anew in a new run folder"
