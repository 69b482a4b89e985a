"""A folder that appears whole or not at all, whatever ends the program that fills it."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segnet_scratch.errors import DataError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to fill, which becomes `target` when the block ends without an exception.

    Else it is removed; what a killed program left is removed by the next that makes the same target. Raises DataError
    where `target` holds something already, and OSError where the system refuses.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise DataError(f"{target}: is there already, and is left as it is; choose a new or an empty folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.segnet-tmp"
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        # The lock tells `_sweep` of another program that this one is alive; the system drops it with the process.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        # Some ten thousand files: one sync of everything costs less than one for each. Before the rename, or a power
        # failure could leave a whole folder of empty files.
        os.sync()
        temporary.rename(target)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Removes what killed programs left of `target`."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.segnet-tmp")
    for folder in target.parent.iterdir():
        if not pattern.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody is filling it, or the file system knows no locks
            continue
        else:
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
