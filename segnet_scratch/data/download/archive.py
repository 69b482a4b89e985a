"""The files of a tar archive that are wanted, and nothing else of it: no link, no device, no path of its choosing.

`tarfile` only parses here. Its extraction is not used, since its filters have been got round more than once: names
are matched against a list, contents are handed out as bytes, and who takes them decides where they go.
"""

import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from segnet_scratch.errors import DataError

MAX_FILE = 16 << 20
"""No single file may have more bytes."""

MAX_FILES = 100_000
"""No archive may have more entries, taken or not."""

MAX_UNPACKED = 8 << 30
"""No archive may unpack to more bytes, taken or not."""

_HEADERS = 1 << 20  # bytes that may lie between two files: header blocks, long names, padding
_COMPRESSED = b"\x1f\x8b"  # how gzip begins


def read_files(
    archive: Path,
    prefix: str,
    wanted: Mapping[str, str],
    limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, bytes]]:
    """Path below `prefix`, with slashes, and content of each wanted file, in the order of the archive (tar or tar.gz).

    wanted: suffix of the files taken, by their folder; a name consists of letters, digits, _ and -. limit: bytes that
    all of them may have together. progress is told of the bytes of the archive read, and their number.

    Raises DataError for an archive that is damaged, for a name that leads elsewhere (absolute, with `..`, a drive or a
    backslash), for a link or device in place of a wanted file, for one that comes twice, and for more than the limits.
    Other entries are passed over, whatever they are. An archive cut off between two files looks whole: check its sum.
    """
    shapes = "|".join(
        f"{re.escape(folder + '/' if folder else '')}[A-Za-z0-9_-]+{re.escape(suffix)}"
        for folder, suffix in wanted.items()
    )
    pattern = re.compile(rf"(?:\./)?{re.escape(prefix)}/({shapes})")
    taken, seen = 0, set()
    with _damage_named(archive):
        for member, read in _entries(archive, progress):
            match = pattern.fullmatch(member.name)
            if match is None:
                continue
            if not member.isreg() or member.issparse():
                raise _refused(archive, member.name, "a link, a folder or a device where a file belongs")
            if match[1].lower() in seen:  # file systems that ignore case would take the two for one
                raise _refused(archive, member.name, "it comes twice")
            seen.add(match[1].lower())
            taken += member.size
            if member.size > MAX_FILE or taken > limit:
                raise _refused(archive, member.name, f"more than {MAX_FILE:,} bytes in a file, or {limit:,} in all")
            yield match[1], read()


class _Rationed:
    """A stream that gives as many bytes as it was allowed, so that nothing claimed inside it costs more."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = MAX_UNPACKED
        self.allowed = _HEADERS

    def read(self, count: int) -> bytes:
        """The next bytes, at most `count`."""
        if count > min(self.allowed, self._left):
            raise tarfile.ReadError("more bytes than any honest archive has")
        block = self._stream.read(count)
        self.allowed -= len(block)
        self._left -= len(block)
        return block


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    """Whatever a damaged or hostile archive makes of the reading becomes a DataError."""
    try:
        yield
    # Headers are met with almost any of these, chains of them with RecursionError.
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{archive}: the archive is damaged ({error}); delete it and download it again.") from error


def _entries(
    archive: Path, progress: Callable[[int, int], None]
) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Every entry with a safe name, and a function that reads its content before the next entry is asked for."""
    total = archive.stat().st_size
    with archive.open("rb") as raw:
        compressed = raw.read(len(_COMPRESSED)) == _COMPRESSED
        raw.seek(0)
        stream = _Rationed(cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw)
        # "r|" reads strictly forward: no header can send it back, so that it would never end.
        with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|") as tar:
            for number, member in enumerate(tar):
                if number == MAX_FILES:
                    raise _refused(archive, member.name, f"more than {MAX_FILES:,} entries")
                if _leads_elsewhere(member.name):
                    raise _refused(archive, member.name, "the name leads out of the data set")
                if member.size < 0:
                    raise _refused(archive, member.name, f"{member.size} bytes")
                stream.allowed = member.size + _HEADERS
                yield member, partial(_content, tar, member)
                progress(raw.tell(), total)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    reader = tar.extractfile(member)
    content = reader.read(member.size) if reader is not None else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
    return content


def _leads_elsewhere(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/") or not name.isprintable()


def _refused(archive: Path, name: str, reason: str) -> DataError:
    return DataError(f"{archive}: refused because of {name[:200]!a}: {reason}. Delete it and download it again.")
