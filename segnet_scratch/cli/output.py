"""Standard output and error as the commands write to them: what only shows may not end or lose what is done."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class Output(io.TextIOBase):
    """sys.stdout or sys.stderr, as it is when something is written, for a rich Console.

    A reader that has gone (`| head`), a closed terminal or a full disk silences it, once and for all; a name that the
    encoding lacks, as one of another locale, is shown with escapes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._silenced: TextIO | None = None
        self.fault: OSError | None = None  # what silenced it

    def write(self, text: str) -> int:
        """Writes what can be written."""
        encoding = self.encoding
        encodable = text.encode(encoding, "backslashreplace").decode(encoding)
        self._attempt(lambda stream: stream.write(encodable))
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        self._attempt(lambda stream: stream.flush())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream, by which rich chooses the characters of its bars."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal that still takes what is written."""
        with suppress(OSError, ValueError, AttributeError):
            return self._stream is not self._silenced and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """That of the stream."""
        return int(self._stream.fileno())

    @property
    def _stream(self) -> Any:
        return getattr(sys, self._name)  # None where the descriptor was closed when Python started

    def _attempt(self, act: Any) -> None:
        stream = self._stream
        if stream is None or stream is self._silenced:
            return
        try:
            act(stream)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._silenced = stream
            self.fault = error if isinstance(error, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
            # What it still holds would be an error again when Python ends.
            with suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
