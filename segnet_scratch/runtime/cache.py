"""Where compiled kernels are kept between runs, and told from what is left of them.

Several users may share the folder, and it may be read-only, full, or hold what a power failure left: whatever is not
intact is made anew, and what cannot be kept there is kept for this process alone.
"""

import atexit
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from segnet_scratch.errors import CompileError
from segnet_scratch.files import reason, write_durably

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """`$SEGNET_CACHE`, else `segnet_scratch` in the user's cache folder. Deleting it is always safe.

    Where no home folder is known either (a user id without an account, as in a container), a folder of this process,
    with a warning.
    """
    own, common = os.environ.get("SEGNET_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own).expanduser() if own else Path(common or "~/.cache").expanduser() / "segnet_scratch"
    except RuntimeError:
        _warn(f"user {os.getuid()} has no home folder")
        return _own_folder()


def outlives_process(folder: Path) -> bool:
    """False for the folder that `cache_directory` names where it knows of none that stays."""
    return not (_own_folder.cache_info().currsize and folder == _own_folder())


def cache_key(*parts: object) -> str:
    """A file name that stands for everything the compiled result depends on."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def cached(path: Path, make: Callable[[], bytes]) -> Path:
    """The file `path` of the cache, written with what `make` gives if it is missing or damaged; returns where it is.

    That is a temporary file of this process where the cache cannot be written. Beside each file lies its SHA-256: a
    shared library that was cut off would end the process that loads it. Raises what `make` raises, and CompileError
    where there is no room for temporary files either.
    """
    own = functools.partial(_own_file, path)
    if _is_whole(path):
        return path
    if _own_folder.cache_info().currsize and _is_whole(own()):
        return own()
    content = make()
    try:
        _write(path, content)
    except OSError as error:
        _warn(f"{path.parent}: {reason(error)}")
        try:
            _write(own(), content)
        except OSError as second:
            raise CompileError(
                f"compiled kernels cannot be kept: {path}: {reason(error)}; {second.filename}: {reason(second)}; set "
                "SEGNET_CACHE to a folder that can be written"
            ) from error
        return own()
    return path


def publish(path: Path, data: bytes) -> None:
    """Writes a file so that other processes see it whole or not at all. CompileError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, [data])
    except OSError as error:
        raise CompileError(
            f"cannot write {path} of the cache: {reason(error)}; or set SEGNET_CACHE to a folder that can be written"
        ) from error


def _seal(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_whole(path: Path) -> bool:
    try:
        return _seal(path).read_bytes() == _digest(path.read_bytes())
    except OSError:  # missing, or of another user who lets nobody read it
        return False


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, [content])
    write_durably(_seal(path), [_digest(content)])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def _own_file(path: Path) -> Path:
    return _own_folder() / path.name


@functools.cache
def _own_folder() -> Path:
    """A folder that is gone when this process ends."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="segnet-"))
    except OSError as error:
        raise CompileError(
            f"there is no folder for compiled kernels, nor for temporary files ({reason(error)}); set SEGNET_CACHE or "
            "TMPDIR to a folder that can be written"
        ) from error
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a forked child
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _warn(cause: str) -> None:
    log.warning("%s; what is compiled is kept for this process alone. Set SEGNET_CACHE to a folder of yours", cause)
