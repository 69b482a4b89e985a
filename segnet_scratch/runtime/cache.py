"""Where compiled kernels are kept between runs."""

import hashlib
import os
from pathlib import Path

from segnet_scratch.errors import CompileError
from segnet_scratch.files import reason, write_durably


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
        write_durably(path, [data])
    except OSError as error:
        raise CompileError(
            f"cannot write {path}, where compiled kernels are kept: {reason(error)}; or set SEGNET_CACHE to a folder "
            "that can be written"
        ) from error
