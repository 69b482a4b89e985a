"""Finds the kernel sources: the `cuda/` folder of the tree or of the wheel, their includes and their hash."""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from segnet_scratch.errors import CompileError
from segnet_scratch.files import real

# // Element types: tf32, bf16; sm_80 and newer.      // Element types: bf16; sm_90a only.
_ELEMENTS = re.compile(r"^// Element types: ([\w, ]+?)(?:; (sm_\d+) and newer|; (sm_\d+a) only)?\.$", re.MULTILINE)
_INTEGERS = re.compile(
    r"^\s*(?:#\s*define\s+(\w+)\s+|(?:static\s+)?constexpr\s+\w+\s+(\w+)\s*=\s*)(\d+)\s*;?", re.MULTILINE
)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@functools.cache
def cuda_directory() -> Path:
    """The folder of the shipped `.cu` files: inside an installed package, or beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "cuda", package.parent / "cuda"):
        if (candidate / "common" / "types.cuh").is_file():
            return candidate
    raise CompileError(
        f"the kernel sources are missing: expected a folder 'cuda' in {package} or beside it; "
        "reinstall segnet_scratch, or run from a complete source tree"
    )


@dataclass(frozen=True)
class Source:
    """A `.cu` file with the text it had when it was read and every project header that it includes."""

    path: Path
    text: str
    digest: str  # of the text and of all included text, wherever they lie: the part of a cache key for the source

    @property
    def include_directories(self) -> tuple[Path, ...]:
        """Where `#include "..."` is looked up: beside the file, then the shipped folder."""
        return _include_directories(self.path)

    @functools.cached_property
    def definitions(self) -> dict[str, int]:
        """The integers that the file and its headers define by name, the file's own first."""
        texts = [*_with_includes(self.path, self.text, self.include_directories, set())]
        return {a or b: int(value) for text in reversed(texts) for a, b, value in _INTEGERS.findall(text)}

    @property
    def elements(self) -> tuple[str, ...]:
        """The element types that it is compiled for, as ElementTypes.name has them; a line of its head says so."""
        match = _ELEMENTS.search(self.text)
        return tuple(re.split(r",\s*", match[1])) if match else ("float32", "float64")

    def compiles_for(self, architecture: str) -> bool:
        """Has this GPU the instructions that the source needs? "sm_90" has those of "sm_80", and of "sm_90a"."""
        match = _ELEMENTS.search(self.text)
        if match and match[3]:
            return architecture.removesuffix("a") == match[3].removesuffix("a")
        number = [int(re.sub(r"\D", "", name)) for name in (architecture, match[2] if match and match[2] else "sm_0")]
        return number[0] >= number[1]

    def target(self, architecture: str) -> str:
        """What a compiler is told to compile for where the GPU is of this architecture: for "sm_90" maybe "sm_90a"."""
        match = _ELEMENTS.search(self.text)
        return match[3] if match and match[3] else architecture

    def check_unchanged(self) -> None:
        """CompileError where the file or a header is not what it was when it was read.

        Compilers read files again; without this, the cache could keep new code under the digest of the old.
        """
        if read_source(self.path).digest != self.digest:
            raise CompileError(f"{self.path} or a header of it has changed since it was read; start again")


def read_source(path: Path) -> Source:
    """Reads a `.cu` file; its digest covers the headers too, which compilers' own caches overlook."""
    path = real(path)
    text = _read_text(path)
    sha = hashlib.sha256()
    for part in _with_includes(path, text, _include_directories(path), set()):
        sha.update(part.encode())
    return Source(path, text, sha.hexdigest())


def _include_directories(path: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys((path.parent, cuda_directory(), cuda_directory() / "common")))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CompileError(f"cannot read the kernel source {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CompileError(f"the kernel source {path} is not UTF-8 text: {error}") from error


def _with_includes(path: Path, text: str, directories: tuple[Path, ...], seen: set[Path]) -> Iterator[str]:
    """A text and those that it includes, each once."""
    yield text
    for name in _INCLUDE.findall(text):
        for directory in (path.parent, *directories):  # as compilers do: beside the including file first
            header = (directory / name).resolve()
            if header.is_file():
                if header not in seen:
                    seen.add(header)
                    yield from _with_includes(header, _read_text(header), directories, seen)
                break


@functools.cache
def shipped_sources() -> tuple[Source, ...]:
    """Every `.cu` file of the project, by name."""
    return tuple(read_source(path) for path in sorted(cuda_directory().glob("[!.]*.cu")))
