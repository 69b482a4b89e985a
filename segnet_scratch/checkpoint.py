"""Checkpoints: safetensors files that survive a kill, a full disk and a damaged disk, and never run code.

The safetensors library writes the format; `_read_safetensors` reads it, without a map of the file that a truncation
would turn into a crash. Ours is also what the format leaves out: a save that is atomic and durable (files.py), and a
SHA-256 of the content, because the format itself accepts a flipped data bit.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from segnet_scratch.errors import CheckpointError
from segnet_scratch.files import reason, write_durably
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.torch_file import is_torch_file, read_state_dict

FORMAT = "1"

_Path = str | os.PathLike[str]
# One entry holds everything of ours: safetensors writes several in no fixed order, and files would differ.
_KEY = "segnet_scratch"

_MAX_HEADER = 4 << 20
# What other files that are taken for weights begin with.
_NO_SAFETENSORS = {
    b"PK\x03\x04": "a PyTorch file or another zip archive, which segnet convert reads",
    b"\x80\x02": "a pickle, as old PyTorch files are, which segnet convert reads",
    b"version ": "a pointer of Git LFS, whose file git lfs pull brings",
    b"<": "a web page or XML",
}
# NumPy's types by safetensors' names.
_DTYPES: dict[str, Any] = {"BOOL": "?", "BF16": BFLOAT16, "F16": "<f2", "F32": "<f4", "F64": "<f8"}
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
        hint = "The file there, if any, is complete; what was training goes on with --resume."
        raise CheckpointError(f"{path}: could not be saved: {reason(error)}. {hint}") from error
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        fix = "give NumPy arrays of numbers of up to 64 bits, and metadata that JSON can hold, without NaN or infinity."
        raise CheckpointError(f"{path}: cannot be saved: {error}; {fix}") from error


def load(path: _Path) -> Checkpoint:
    """Read and verify a checkpoint; CheckpointError where it is missing, damaged in any bit or not of `save`."""
    with _opened(path) as stream:
        tensors, texts = _read_safetensors(stream, ours=True)
        record, metadata = _our_metadata(texts)
        if _record(metadata, tensors) != record:
            raise ValueError("damaged content, which does not match its checksum")
        return Checkpoint(tensors, metadata)


def load_foreign(path: _Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of any safetensors file, or of a state dict that torch.save wrote (no metadata).

    bfloat16 as float32. CheckpointError where it is missing, cut off, malformed, or a pickle that would run code.
    """
    fix = "get it anew; of a PyTorch module, save the state dict alone: torch.save(model.state_dict(), 'weights.pth')"
    with _opened(path, "safetensors or PyTorch", fix) as file:
        start = file.read(4)
        file.seek(0)
        return (read_state_dict(file), {}) if is_torch_file(start) else _read_safetensors(file)


def metadata_in(texts: Mapping[str, str]) -> dict[str, Any]:
    """What `save` was given, out of the metadata of a file that `load_foreign` read; {} where others wrote it."""
    with suppress(ValueError):
        return _our_metadata(texts)[1]
    return {}


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


def _our_metadata(texts: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The record of a file written by `save` as it stands in its metadata, and what was saved in it."""
    text = texts.get(_KEY)
    if text is None:
        raise ValueError("a file that was not written by this project (segnet convert reads others)")
    record = None
    with suppress(ValueError, RecursionError):
        record = json.loads(text)
    if not isinstance(record, dict) or not isinstance(record.get("metadata"), dict):
        raise ValueError("metadata that is no JSON object")
    if record.get("format") != FORMAT:
        raise ValueError(f"format {record.get('format')!r:.40}, not {FORMAT}")
    return text, record["metadata"]


def _read_safetensors(file: BinaryIO, ours: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, its header checked as strictly as the library does.

    Where it should be `ours` and is not, no tensor is read.

    The library maps the files that it opens, and a file that somebody truncates while it is mapped (`cp` over a
    checkpoint does) ends the process with SIGBUS. Parsing the whole content from memory would need that memory twice,
    and a copy of the header for the library a folder for temporary files, which may be full. So we read it ourselves.
    """
    start, size = file.read(8), os.fstat(file.fileno()).st_size
    for mark, kind in _NO_SAFETENSORS.items():
        if start.startswith(mark):
            raise ValueError(kind)
    if not start:
        raise ValueError("an empty file")
    length = int.from_bytes(start, "little")
    # Megabytes of header cost seconds and a gigabyte to read; 2,000 tensors need 0.2 MB.
    if length > _MAX_HEADER:
        long = f"a header of {length} bytes, more than {_MAX_HEADER}"
        raise ValueError(long if length <= size else f"another kind of file: it begins with {start!r}")
    header = None
    with suppress(ValueError):
        header = json.loads(file.read(min(length, size)).decode())  # Python makes room for all it is asked to read
    if len(start) < 8 or not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that is no JSON object of texts")
    places = sorted((_place_of(name, entry), name) for name, entry in header.items())
    end = 0
    for (begin, after, _, _), name in places:
        if begin != end:
            raise ValueError(f"tensor {name[:80]} at byte {begin} of the data, expected {end}: a hole or an overlap")
        end = after
    if end != size - 8 - length:
        raise ValueError(f"{size - 8 - length} bytes of data, expected {end}")
    if ours:
        _our_metadata(metadata)
    return {name: _read_tensor(file, name, dtype, shape) for (_, _, dtype, shape), name in places}, metadata


def _read_tensor(file: BinaryIO, name: str, dtype: str, shape: Sequence[int]) -> np.ndarray:
    try:
        array = np.empty(shape, _DTYPES[dtype])
    except ValueError as error:  # too many sides, or an empty tensor whose other sides overflow its size
        raise ValueError(f"tensor {name[:80]}, which NumPy cannot hold: {error}") from error
    if file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError("data that ends too early: it was cut off while it was read")
    return array.astype(np.float32) if dtype == "BF16" else array


def _place_of(name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """(first byte, byte behind the last, dtype, shape) of a tensor by its entry in the header."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"tensor {name[:80]} without dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name[:80]} of {dtype!r:.40}, which NumPy has not")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name[:80]} with sides or offsets that are no sizes")
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(f"tensor {name[:80]} of {end - begin} bytes, which its shape and type do not fill")
    return begin, end, dtype, shape


@contextmanager
def _opened(path: _Path, kind: str = "safetensors", fix: str = "") -> Iterator[BinaryIO]:
    """The file; what is wrong with it becomes a CheckpointError that tells damage from other causes."""
    path = Path(path)
    try:
        # Also keeps a named pipe from being opened, which would wait for ever.
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; name a file in it, such as {path / 'best.safetensors'}.")
        if path.exists() and not path.is_file():
            raise ValueError("a device")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}.") from None
    except MemoryError as error:
        raise CheckpointError(f"{path}: memory is short: {error}; end other programs.") from None
    except (ValueError, RecursionError) as error:
        # It may quote a hostile name, a megabyte long.
        got, fix = str(error)[:300], fix or _way_out(path)
        raise CheckpointError(f"{path}: expected a sound {kind} file, got: {got}; {fix}.") from None


def _way_out(path: Path) -> str:
    others = []
    with suppress(OSError):  # a folder that may not be searched has no other checkpoint to offer
        names = {"last.safetensors", "best.safetensors"} - {path.name}
        others = [str(path.parent / name) for name in sorted(names) if (path.parent / name).is_file()]
    return f"use {' or '.join(others) or 'another copy of it'}, or train anew in a new run folder"
