"""One file over HTTP from the first of several mirrors that has it, resumed where it broke off, and verified.

pooch, which would be at hand, begins anew after every break; with two gigabytes from a slow host that may never end.
Resuming is one header and three answers (206, 200, 416), which urllib serves as well as a client library would.
"""

import hashlib
import os
import re
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import BaseHandler, Request, build_opener

from segnet_scratch import __version__
from segnet_scratch.errors import DataError
from segnet_scratch.files import lock, reason

# Told what is being done, and how many bytes of how many are.
Progress = Callable[[str, int, int], None]

_BLOCK = 1 << 18
_TIMEOUT = 30.0  # seconds without a byte after which a connection counts as broken
_PAUSE = 2.0  # seconds before a second try, twice as long before the next
_FRUITLESS_TRIES = 3  # in a row, of one mirror
_TRIES = 50  # of one mirror in all: one that breaks off after every few bytes is no mirror
_OTHER_MIRROR = "give another address with --mirror"
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def fetch(
    urls: Sequence[str], target: Path, checksum: str, size: int, progress: Progress = silent, fix: str = _OTHER_MIRROR
) -> None:
    """Gets a file of `size` bytes with this checksum, "md5:DIGITS" or "sha256:DIGITS", to `target`, unless it is there.

    Of the digits as many count as are given. `fix` is what else can be done where no mirror delivers.

    Until it is whole and verified it is called `target`.part; another call goes on with that, from whichever mirror.
    Raises DataError, which tells what each mirror said, where none delivers, where `target` is another file, where
    another process is at it, and where the disk is full.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.stat().st_size >= size:
            with target.open("rb") as stream:
                got = _Download(stream, checksum, size, progress).checksum_found()
            if got != checksum:
                what = f"another file than expected ({got}, expected {checksum})"
                raise DataError(f"{target}: {what}; move it away or delete it.")
            return
        if target.exists():
            target.rename(part)  # what another program broke off under the final name
        with part.open("a+b") as stream:
            if not lock(stream.fileno(), part):
                raise DataError(f"{part}: another process is downloading it; wait for it.")
            _Download(stream, checksum, size, progress).from_mirrors(urls, target, fix)
            os.fsync(stream.fileno())
            part.rename(target)
    except OSError as error:
        raise DataError(f"{part}: {reason(error)}. What is there is kept; run it again, it goes on.") from error


class _MirrorError(Exception):
    """This mirror did not deliver; `again` where another try may help."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class _HttpOnly(BaseHandler):
    """urllib's own opener would follow to ftp, and take file and data addresses."""

    def default_open(self, request: Request) -> None:
        """Asked before any other handler, for redirections too."""
        if request.type not in ("http", "https"):
            raise URLError(f"unknown url type: {request.type}")


@dataclass
class _Download:
    """A file, open to be read and to be appended to, and what it is to become."""

    stream: BinaryIO
    checksum: str
    size: int
    progress: Progress

    def from_mirrors(self, urls: Sequence[str], target: Path, fix: str) -> None:
        """Completes the file from the first that delivers; else DataError."""
        reasons = []
        for url in urls:
            try:
                return self._complete(url)
            except _MirrorError as error:
                reasons.append(f"  {url}: {error}")
        raise DataError(
            f"{target.name}: none of {len(urls)} mirrors delivered it:",
            *reasons,
            f"{self._kept():,} of {self.size:,} bytes are kept. Run it again later, {fix}, or get the file elsewhere "
            f"and put it there yourself: {target}",
        )

    def checksum_found(self) -> str:
        """That of the file, of the algorithm and with as many digits as the one expected."""
        # These are what publishers give: VOC's and SBD's MD5, the first digits of SHA-256 in torchvision's file names.
        # They guard against damage and mix-ups; that two files with one MD5 can be made does not matter for that.
        digest = hashlib.new(self.checksum.partition(":")[0], usedforsecurity=False)
        self.stream.seek(0)
        while block := self.stream.read(_BLOCK):
            digest.update(block)
            self.progress("check", self.stream.tell(), self.size)
        return f"{digest.name}:{digest.hexdigest()}"[: len(self.checksum)]

    def _kept(self) -> int:
        return self.stream.seek(0, os.SEEK_END)

    def _complete(self, url: str) -> None:
        """Appends what is missing, with as many connections as it takes, until the checksum is right."""
        all_from_here, fruitless = self._kept() == 0, 0
        for _ in range(_TRIES):
            if (before := self._kept()) > self.size:
                before = self.stream.truncate(0)
            try:
                if before < self.size:
                    self._append(url, before)
                if (got := self.checksum_found()) == self.checksum:
                    return
                self.stream.truncate(0)
                if all_from_here:
                    raise _MirrorError(f"another file ({got}, expected {self.checksum})")
                all_from_here = True  # perhaps what was there before was at fault
                continue
            except _MirrorError as error:
                fruitless = 0 if self.stream.tell() > before else fruitless + 1
                if not error.again or fruitless == _FRUITLESS_TRIES:
                    raise
            time.sleep(_PAUSE * 2**fruitless)
        raise _MirrorError(f"broke off {_TRIES} times")

    def _append(self, url: str, start: int) -> None:
        """One connection: bytes from `start` on, or from 0 where the server cannot begin elsewhere."""
        headers = {"User-Agent": f"segnet_scratch/{__version__}", "Accept-Encoding": "identity"}
        try:
            request = Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))
            with build_opener(_HttpOnly).open(request, timeout=_TIMEOUT) as answer:
                self._take(answer, start)
        except HTTPError as error:
            error.close()
            if error.code == 416 and start:
                # Its file is shorter than what we have: from the start, it says how long it is.
                return self._append(url, self.stream.truncate(0))
            raise _MirrorError(f"HTTP {error.code} {error.reason}", again=error.code in _TRY_AGAIN) from None
        except URLError as error:
            again = not isinstance(error.reason, ssl.SSLCertVerificationError)
            raise _MirrorError(f"cannot be reached ({error.reason})", again) from None
        except (HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise _MirrorError(f"the connection broke ({error!r})", again=True) from None
        except ValueError as error:  # no URL at all, or headers that are no numbers
            raise _MirrorError(f"cannot be used ({error})") from None

    def _take(self, answer: HTTPResponse, start: int) -> None:
        if answer.status != 206:
            start = self.stream.truncate(0)  # it sends everything, whatever was asked for
        elif not re.fullmatch(rf"bytes {start}-\d+/({self.size}|\*)", offer := answer.headers.get("Content-Range", "")):
            self.stream.truncate(0)
            raise _MirrorError(f"offers {offer!r:.80}, not bytes {start}- of {self.size}")
        self.stream.seek(start)
        promised = answer.headers.get("Content-Length")
        if promised is not None and start + int(promised) != self.size:
            raise _MirrorError(f"another file ({start + int(promised):,} bytes, expected {self.size:,})")
        while block := answer.read1(_BLOCK):  # what came before a break is not lost
            if self.stream.tell() + len(block) > self.size:
                self.stream.truncate(0)
                raise _MirrorError(f"another file (more than {self.size:,} bytes)")
            self.stream.write(block)
            self.progress("download", self.stream.tell(), self.size)
        if self.stream.tell() < self.size:
            raise _MirrorError(f"the connection broke off after {self.stream.tell():,} of {self.size:,} bytes", True)
