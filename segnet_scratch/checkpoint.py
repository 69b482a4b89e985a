"""Checkpoints: safetensors files that survive a kill, a full disk and a damaged disk, and never run code.

Layout of a safetensors file: 8 bytes with the header's length (little-endian), the header (JSON: for each
tensor its dtype, shape and byte range; text under "__metadata__"), then the tensors' bytes, little-endian,
without gaps. The format itself has no checksum and accepts a flipped data bit, so our files carry a SHA-256
in their metadata.

The file is read and written here rather than through the safetensors package: every size is checked before
memory is taken, a load needs one copy of the file in memory and a save none, and every system call of a save
is in sight.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import CheckpointError

FORMAT = "1"
# Parsed JSON can take twenty times its length in memory; SegNet with its optimiser state needs 40 KiB.
MAXIMUM_HEADER = 1 << 20

_LENGTH_BYTES = 8
_METADATA_KEY = "segnet_scratch"
_FORMAT_KEY = "segnet_scratch.format"
_CHECKSUM_KEY = "segnet_scratch.sha256"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.segnet-tmp")
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_BFLOAT16 = "BF16"  # NumPy has no such type; the bits are the upper half of a float32


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. Its tensors are writable views of one buffer: keeping one keeps all of it."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """One tensor as the header describes it; start and stop are byte offsets into the data."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _MalformedError(Exception):
    """What is wrong with a file; the public functions add the file's name and the fix."""


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, object]
) -> None:
    """Write a checkpoint atomically and durably: once it returns, a power failure does not lose it.

    The metadata is any mapping that JSON can hold (finite numbers, text keys); it comes back as JSON gives
    it, tuples as lists. The same content gives the same bytes.

    Raises CheckpointError for content that the file cannot hold, and when the system refuses to write. The
    path then still holds the previous checkpoint, complete; only where the very last call, the sync of the
    directory, fails does it already hold the new one, also complete. No temporary stays behind.
    """
    path = Path(path)
    try:
        arrays = _to_disk_order(tensors)
        text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    except (_MalformedError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be saved: {error}; give NumPy arrays of {', '.join(_DTYPES)} and metadata that "
            "JSON can hold, without NaN or infinity."
        ) from error
    header = _encode_header(arrays, text)
    if len(header) > MAXIMUM_HEADER:
        raise CheckpointError(
            f"{path}: cannot be saved: expected a header of at most {MAXIMUM_HEADER} bytes, got "
            f"{len(header)}; save large values as tensors, not as metadata."
        )
    blocks: list[bytes | memoryview] = [len(header).to_bytes(_LENGTH_BYTES, "little"), header]
    blocks.extend(_bytes_of(array) for array in arrays.values())
    try:
        write_durably(path, blocks)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be saved: {error.strerror}; the file there, if any, is complete. Make room "
            "or correct the permissions, then continue with --resume."
        ) from error


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint written by `save` and verify its checksum.

    Raises CheckpointError, naming the file and the way out, for a file that is missing, cut off, damaged in
    any bit, no safetensors file, or not written by `save`.
    """
    path = Path(path)
    with _reading(path, _way_out(path)) as file:
        entries, strings, size = _read_header(file)
        text, checksum = _our_metadata(strings)
        tensors = _read_tensors(file, entries, size)
        if _checksum(text, tensors) != checksum:
            raise _MalformedError("expected content that matches its checksum, got damaged content")
        return Checkpoint(tensors, _decode_metadata(text))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a checkpoint, read from its header alone.

    The checksum covers the tensors too, so only `load` verifies it. Raises CheckpointError as `load` does for
    all that a header shows.
    """
    path = Path(path)
    with _reading(path, _way_out(path)) as file:
        _, strings, _ = _read_header(file)
        return _decode_metadata(_our_metadata(strings)[0])


def load_foreign(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the tensors of any safetensors file, without a checksum; bfloat16 comes back as float32.

    Raises CheckpointError for a file that is missing, cut off, malformed, or has a dtype that NumPy has not.
    """
    path = Path(path)
    fix = (
        "get the file anew; weights in another format, as PyTorch's .pth, must first be converted to "
        "safetensors, because reading them can run code"
    )
    with _reading(path, fix) as file:
        entries, _, size = _read_header(file)
        return _read_tensors(file, entries, size)


def sweep_temporaries(directory: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporaries that killed saves left in a directory, and return their paths.

    A save in progress has one too, so call it only where nobody else writes to the directory. Raises
    CheckpointError for a directory that cannot be read or a temporary that cannot be removed.
    """
    try:
        orphans = sorted(
            orphan
            for orphan in Path(directory).iterdir()
            if _TEMPORARY.fullmatch(orphan.name) and orphan.is_file() and not orphan.is_symlink()
        )
        for orphan in orphans:
            orphan.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: leftovers of an interrupted save could not be removed: {error.strerror}; "
            "check the path and its permissions."
        ) from error
    return orphans


def write_durably(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Replace a file by the given bytes; a reader, also after a crash, finds the old file or the new one.

    The order is what makes it hold: write a temporary, sync it, rename it over the file, sync the directory.
    A rename that reaches the disk before the data would leave an empty file after a power failure. Raises
    OSError.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.segnet-tmp"
    # Opened first: a directory that cannot be opened must be noticed while the old file is still in place.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        try:
            _write_synced(temporary, blocks)
            temporary.replace(path)
        except BaseException:
            # The first error is the one to report; a leftover is swept at the next start.
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_directory(directory)
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


def _sync_directory(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory and say so by EINVAL; nothing is left to do there.
        if error.errno != errno.EINVAL:
            raise


def _to_disk_order(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors, contiguous and little-endian; widest elements first, so that each lies aligned."""
    arrays: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        # Printable ASCII has one spelling in JSON, so that no flipped bit of the header goes unnoticed.
        if not isinstance(name, str) or not (name.isascii() and name.isprintable()) or name == "__metadata__":
            raise _MalformedError(f"expected tensor names of printable ASCII characters, got {name!r}")
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("<") not in _CODES:
            raise _MalformedError(
                f"tensor {name}: expected a numeric NumPy array, got "
                f"{getattr(array, 'dtype', type(array).__name__)}"
            )
        arrays[name] = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _encode_header(arrays: Mapping[str, np.ndarray], metadata: str) -> bytes:
    strings = {_FORMAT_KEY: FORMAT, _CHECKSUM_KEY: _checksum(metadata, arrays), _METADATA_KEY: metadata}
    header: dict[str, object] = {"__metadata__": strings}
    start = 0
    for name, array in arrays.items():
        stop = start + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype], "shape": array.shape, "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)  # the data starts at a multiple of 8, as the format asks


def _checksum(metadata: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, metadata]).encode())
    for name, array in sorted(arrays.items()):
        # Name, dtype and shape tell how many bytes follow, so no two contents feed the digest alike.
        digest.update(json.dumps([name, _CODES[array.dtype], array.shape]).encode())
        digest.update(_bytes_of(array))
    return digest.hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _way_out(path: Path) -> str:
    others = []
    with suppress(OSError):  # a folder that may not be searched has no other checkpoint to offer
        others = [
            path.parent / name
            for name in ("last.safetensors", "best.safetensors")
            if name != path.name and (path.parent / name).is_file()
        ]
    return f"use {' or '.join(map(str, others)) or 'another copy of it'}, or train anew in a new run folder"


@contextmanager
def _reading(path: Path, fix: str) -> Iterator[BufferedReader]:
    """The file, open for reading; errors inside become CheckpointErrors with its name and the fix."""
    try:
        # Also keeps a named pipe from being opened, which would wait for ever.
        if path.exists() and not path.is_file():
            raise _MalformedError("expected a safetensors file, got a directory or a device")
        with path.open("rb") as file:
            yield file
    except _MalformedError as error:
        raise CheckpointError(f"{path}: {error}; {fix}.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error.strerror}; {fix}.") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: does not fit into memory; {fix}.") from error


def _read_header(file: BufferedReader) -> tuple[list[_Entry], dict[str, str], int]:
    """The tensors in the order of their bytes, the metadata strings, and the size of the data in bytes.

    Leaves the file at the first byte of data. Nothing larger than MAXIMUM_HEADER is allocated or parsed.
    """
    file_size = os.fstat(file.fileno()).st_size
    if file_size < _LENGTH_BYTES:
        raise _MalformedError(f"expected a safetensors file, got only {file_size} bytes")
    header_size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    data_size = file_size - _LENGTH_BYTES - header_size
    if header_size > MAXIMUM_HEADER or data_size < 0:
        raise _MalformedError(
            f"expected a safetensors file, got a header of {header_size} bytes in a file of {file_size} "
            "(another format, or cut off)"
        )
    encoded = file.read(header_size)
    if not encoded.startswith(b"{"):
        raise _MalformedError("expected a safetensors file, got a header that is no JSON object")
    try:
        # An explicit codec, because json.loads would also accept UTF-16 bytes.
        header = json.loads(encoded.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _MalformedError(f"expected a safetensors file, got a damaged header ({error})") from error
    strings = header.pop("__metadata__", {})
    if not isinstance(strings, dict) or not all(isinstance(value, str) for value in strings.values()):
        raise _MalformedError("expected metadata of text values, got a damaged header")
    entries = sorted((_entry(*item) for item in header.items()), key=lambda entry: (entry.start, entry.stop))
    position = 0
    for entry in entries:
        if entry.start != position:
            raise _MalformedError(
                f"{_label(entry.name)}: expected its data at byte {position}, got {entry.start}"
            )
        position = entry.stop
    if position != data_size:
        raise _MalformedError(
            f"expected {position} bytes of tensor data, got {data_size} (cut off or damaged)"
        )
    return entries, strings, data_size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _MalformedError("expected each name once, got a header that repeats one")
    return members


def _entry(name: str, description: Any) -> _Entry:
    """One tensor's description, with every property checked; its byte range fits its dtype and shape."""
    label = _label(name)
    if not isinstance(description, dict) or description.keys() != {"dtype", "shape", "data_offsets"}:
        raise _MalformedError(f"{label}: expected dtype, shape and data_offsets, got a damaged header")
    code, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if code != _BFLOAT16 and (not isinstance(code, str) or code not in _DTYPES):
        raise _MalformedError(
            f"{label}: expected a dtype of {', '.join(_DTYPES)}, {_BFLOAT16}, got {code!r:.40}"
        )
    for numbers in (shape, offsets):
        # type() rather than isinstance(), because JSON's true would pass for an int.
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise _MalformedError(f"{label}: expected lists of sizes, got a damaged header")
    if len(shape) > 32 or len(offsets) != 2:
        raise _MalformedError(f"{label}: expected at most 32 dimensions and 2 offsets, got a damaged header")
    size = math.prod(shape) * _storage(code).itemsize
    if offsets[1] - offsets[0] != size:
        raise _MalformedError(
            f"{label}: expected {size} bytes for {code} {shape}, got {offsets[1] - offsets[0]}"
        )
    return _Entry(name, code, tuple(shape), offsets[0], offsets[1])


def _label(name: str) -> str:
    # A hostile name may be a megabyte long or hold control sequences for the terminal.
    return f"tensor {name!r:.80}"


def _storage(code: str) -> np.dtype[Any]:
    return np.dtype("<u2") if code == _BFLOAT16 else _DTYPES[code]


def _read_tensors(file: BufferedReader, entries: list[_Entry], size: int) -> dict[str, np.ndarray]:
    buffer = np.empty(size, np.uint8)
    if file.readinto(buffer.data) != size:
        raise _MalformedError(
            f"expected {size} bytes of tensor data, got fewer; the file shrank while it was read"
        )
    tensors = {}
    for entry in entries:
        array = buffer[entry.start : entry.stop].view(_storage(entry.code))
        if entry.code == _BFLOAT16:
            widened = array.astype(np.uint32)
            widened <<= 16
            array = widened.view(np.float32)
        try:
            array = array.reshape(entry.shape)
        except ValueError as error:  # an empty tensor whose other sides overflow an array's size
            raise _MalformedError(
                f"{_label(entry.name)}: expected a possible shape, got {entry.shape}"
            ) from error
        # Files of other programs may place a tensor at any byte; kernels and ctypes need aligned elements.
        tensors[entry.name] = array if array.flags.aligned else array.copy()
    return tensors


def _our_metadata(strings: Mapping[str, str]) -> tuple[str, str]:
    """The metadata as JSON text and the checksum, from the metadata strings of a file written by `save`."""
    if strings.keys() != {_FORMAT_KEY, _CHECKSUM_KEY, _METADATA_KEY}:
        raise _MalformedError(
            "expected a checkpoint written by this project, got another safetensors file or a damaged header"
        )
    if strings[_FORMAT_KEY] != FORMAT:
        raise _MalformedError(f"expected checkpoint format {FORMAT}, got {strings[_FORMAT_KEY]!r:.40}")
    return strings[_METADATA_KEY], strings[_CHECKSUM_KEY]


def _decode_metadata(text: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _MalformedError("expected metadata in JSON, got a damaged header") from error
    if not isinstance(metadata, dict):
        raise _MalformedError("expected metadata that is a JSON object, got a damaged header")
    return metadata
