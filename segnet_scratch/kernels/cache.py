"""Where compiled kernels are kept between runs."""

import hashlib
import os
import tempfile
from pathlib import Path

from segnet_scratch.errors import CompileError


def cache_directory() -> Path:
    """`$SEGNET_CACHE`, else `segnet_scratch` in the user's cache folder. Deleting it is always safe."""
    chosen = os.environ.get("SEGNET_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segnet_scratch"


def cache_key(*parts: object) -> str:
    """A file name that stands for everything the compiled result depends on."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def publish(path: Path, data: bytes) -> None:
    """Writes a file so that other processes see it whole or not at all. CompileError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CompileError(
            f"cannot write {path}, where compiled kernels are kept: {error.strerror or error}; "
            "set SEGNET_CACHE to a folder that can be written"
        ) from error
