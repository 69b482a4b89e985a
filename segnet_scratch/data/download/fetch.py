"""One file over HTTP from the first of several mirrors that has it, resumed where it broke off, and verified.

pooch, which would be at hand, begins anew after every break; with two gigabytes from a slow host that may never end.
Resuming is one header and three answers (206, 200, 416), which urllib serves as well as a client library would.
"""

import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from segnet_scratch import __version__
from segnet_scratch.errors import DataError
from segnet_scratch.files import lock, reason

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes of how many are."""

_BLOCK = 1 << 20
_FRUITLESS_TRIES = 3  # in a row, of one mirror
_TRIES = 50  # of one mirror in all: one that breaks off after every few bytes is no mirror
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class _MirrorError(Exception):
    """This mirror did not deliver; `again` where another try may help."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


def fetch(
    urls: Sequence[str],
    target: Path,
    checksum: str,
    size: int,
    progress: Progress = lambda what, done, total: None,
    timeout: float = 30.0,
    pause: float = 2.0,
    fix: str = "give another address with --mirror",
) -> None:
    """Gets a file of `size` bytes with this checksum, "md5:DIGITS" or "sha256:DIGITS", to `target`, unless it is there.

    Of the digits as many count as are given. `fix` is what else can be done where no mirror delivers.

    Until it is whole and verified it is called `target`.part; another call goes on with that, from whichever mirror.
    timeout: seconds without a byte after which a connection counts as broken. pause: seconds before a second try,
    twice as long before the next. Raises DataError, which tells what each mirror said, where none delivers, where
    `target` is another file, where another process is at it, and where the disk is full.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if target.stat().st_size >= size:
                return _check_present(target, checksum, size, progress)
            target.rename(part)  # what another program broke off under the final name
        with _locked(part) as stream:
            _from_mirrors(urls, stream, target, checksum, size, progress, timeout, pause, fix)
            os.fsync(stream.fileno())
            part.rename(target)
    except OSError as error:
        raise DataError(f"{part}: {reason(error)}. What is there is kept; run it again, it goes on.") from error
    return None


def _from_mirrors(
    urls: Sequence[str],
    stream: BinaryIO,
    target: Path,
    checksum: str,
    size: int,
    progress: Progress,
    timeout: float,
    pause: float,
    fix: str,
) -> None:
    """Fills `stream` with the verified file, or raises DataError."""
    reasons = []
    for url in urls:
        try:
            from_start = stream.seek(0, os.SEEK_END) == 0
            _whole(url, stream, size, progress, timeout, pause)
            got = _checksum(stream, size, checksum, progress)
            if got != checksum and not from_start:
                # Perhaps what was there before was at fault: once more, all from this mirror.
                stream.truncate(0)
                _whole(url, stream, size, progress, timeout, pause)
                got = _checksum(stream, size, checksum, progress)
            if got == checksum:
                return
            stream.truncate(0)
            reasons.append(f"  {url}: another file ({got}, expected {checksum})")
        except _MirrorError as error:
            reasons.append(f"  {url}: {error}")
    kept = stream.seek(0, os.SEEK_END)
    raise DataError(
        f"{target.name}: none of {len(urls)} mirrors delivered it:",
        *reasons,
        f"{kept:,} of {size:,} bytes are kept. Run it again later, {fix}, or get the file elsewhere and put it "
        f"there yourself: {target}",
    )


def _whole(url: str, stream: BinaryIO, size: int, progress: Progress, timeout: float, pause: float) -> None:
    """Appends to `stream` what is missing of `size` bytes, with as many connections as it takes."""
    fruitless = 0
    for _ in range(_TRIES):
        before = stream.seek(0, os.SEEK_END)
        if before == size:
            return
        if before > size:
            before = stream.truncate(0)
        try:
            _append(url, stream, before, size, progress, timeout)
            return
        except _MirrorError as error:
            fruitless = 0 if stream.tell() > before else fruitless + 1
            if not error.again or fruitless == _FRUITLESS_TRIES:
                raise
        time.sleep(pause * 2**fruitless)
    raise _MirrorError(f"broke off {_TRIES} times")


def _append(url: str, stream: BinaryIO, start: int, size: int, progress: Progress, timeout: float) -> None:
    """One connection: bytes from `start` on, or from 0 where the server cannot begin elsewhere."""
    with _connect(url, start, timeout) as answer:
        if answer.status == 206:
            place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not place or int(place[1]) != start or place[2] not in (str(size), "*"):
                stream.truncate(0)
                raise _MirrorError(f"offers {answer.headers.get('Content-Range')!r:.80}, not bytes {start}- of {size}")
        else:
            start = stream.truncate(0)  # it sends everything, whatever was asked for
        stream.seek(start)
        promised = answer.headers.get("Content-Length")
        if promised is not None and start + int(promised) != size:
            raise _MirrorError(f"another file ({start + int(promised):,} bytes, expected {size:,})")
        while block := _receive(answer):
            if stream.tell() + len(block) > size:
                stream.truncate(0)
                raise _MirrorError(f"another file (more than {size:,} bytes)")
            stream.write(block)
            progress("download", stream.tell(), size)
        if stream.tell() < size:
            raise _MirrorError(f"the connection broke off after {stream.tell():,} of {size:,} bytes", again=True)


@contextmanager
def _connect(url: str, start: int, timeout: float) -> Iterator[http.client.HTTPResponse]:
    headers = {"User-Agent": f"segnet_scratch/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with _opener().open(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            # Its file is shorter than what we have: from the start, it says how long it is.
            with _connect(url, 0, timeout) as answer:
                yield answer
            return
        raise _MirrorError(f"HTTP {error.code} {error.reason}", again=error.code in _TRY_AGAIN) from None
    except urllib.error.URLError as error:
        again = not isinstance(error.reason, ssl.SSLCertVerificationError)
        raise _MirrorError(f"cannot be reached ({error.reason})", again) from None
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _MirrorError(f"the connection broke ({error or type(error).__name__})", again=True) from None
    except ValueError as error:  # no URL at all, or headers that are no numbers
        raise _MirrorError(f"cannot be used ({error})") from None


def _receive(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(_BLOCK)
    except http.client.IncompleteRead as error:
        return error.partial  # what came is good; the missing rest is noticed by its length


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https only: urllib's own would follow to ftp, and take file and data addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _check_present(target: Path, checksum: str, size: int, progress: Progress) -> None:
    with target.open("rb") as stream:
        got = _checksum(stream, size, checksum, progress)
    if got != checksum:
        raise DataError(
            f"{target}: another file than expected ({got}, expected {checksum}); move it away or delete it."
        )


def _checksum(stream: BinaryIO, size: int, like: str, progress: Progress) -> str:
    """The checksum of a stream, of the algorithm and with as many digits as `like`."""
    # These are what the publishers give: VOC's and SBD's MD5, the first digits of SHA-256 in torchvision's file names.
    # They guard against damage and mix-ups; that two files with one MD5 can be made does not matter for that.
    digest = hashlib.new(like.partition(":")[0], usedforsecurity=False)
    stream.seek(0)
    while block := stream.read(_BLOCK):
        digest.update(block)
        progress("check", stream.tell(), size)
    return f"{digest.name}:{digest.hexdigest()}"[: len(like)]


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """The partial file, for this process alone."""
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
        if not lock(stream.fileno(), part):
            raise DataError(f"{part}: another process is downloading it; wait for it.")
        yield stream
