"""Finds the kernel sources: the `cuda/` folder of the tree or of the wheel, their includes and their hash."""

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from segnet_scratch.errors import CompileError

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
    digest: str  # of the text and of all included text: the part of a cache key that follows the source

    @property
    def include_directories(self) -> tuple[Path, ...]:
        """Where `#include "..."` is looked up: beside the file, then the shipped folder."""
        return tuple(dict.fromkeys((self.path.parent, cuda_directory(), cuda_directory() / "common")))


def read_source(path: Path) -> Source:
    """Reads a `.cu` file; its digest covers the headers too, which compilers' own caches overlook."""
    path = Path(path).resolve()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CompileError(f"cannot read the kernel source {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CompileError(f"the kernel source {path} is not UTF-8 text: {error}") from error
    sha = hashlib.sha256(str(path).encode())
    seen: set[Path] = set()
    _hash_with_includes(path, text, sha, seen)
    return Source(path, text, sha.hexdigest())


def _hash_with_includes(path: Path, text: str, sha: "hashlib._Hash", seen: set[Path]) -> None:
    sha.update(text.encode())
    for name in _INCLUDE.findall(text):
        for directory in (path.parent, cuda_directory(), cuda_directory() / "common"):
            header = (directory / name).resolve()
            if header.is_file():
                if header not in seen:
                    seen.add(header)
                    _hash_with_includes(header, header.read_text(encoding="utf-8"), sha, seen)
                break


@functools.cache
def shipped_sources() -> tuple[Source, ...]:
    """Every `.cu` file of the project, by name."""
    return tuple(read_source(path) for path in sorted(cuda_directory().glob("*.cu")))
