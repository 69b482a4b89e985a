"""The files of a tar archive that are wanted, and nothing else of it: no link, no device, no path of its choosing.

Its checksum has been found right before. `tarfile` only parses here: names are matched against a list, contents are
handed out as bytes, and who takes them decides where they go.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from segnet_scratch.data.download.sources import Source
from segnet_scratch.data.loader import Progress, silent
from segnet_scratch.errors import DataError


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
