"""Atomic writes: files and folders that appear whole or not at all, and the lock that keeps others out of a folder.

Whatever this program leaves on a disk goes through here. The order is what makes it hold, also where the power fails:
write a temporary beside the target, sync it, rename it over the target, sync the folder. A rename that reached the disk
before the data would leave an empty file.
"""

import errno
import fcntl
import functools
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from segnet_scratch.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.segnet-tmp")
_LITTER = re.compile(r"\._.*|\.DS_Store|thumbs\.db|ehthumbs\.db|desktop\.ini", re.IGNORECASE)
_NAME_KEPT = 40  # characters: a temporary of a name as long as the file system takes must not be longer than that
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}

_FIXES = {
    "make room on that disk": (errno.ENOSPC,),
    "your quota there is used up; make room": (errno.EDQUOT,),
    "files there may not be that large: raise ulimit -f, or use another file system": (errno.EFBIG,),
    "correct the permissions, or choose another place": (errno.EACCES, errno.EPERM),
    "that file system can only be read; choose another place": (errno.EROFS,),
    "check the path": (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    "choose another name": (errno.EEXIST, errno.ENOTEMPTY),
    "choose a shorter name": (errno.ENAMETOOLONG,),
    "close other files, or raise ulimit -n": (errno.EMFILE,),
    "the system has too many open files; close other programs": (errno.ENFILE,),
    "the disk reports a fault; check it": (errno.EIO,),
    "the file server has lost it; mount it anew": (errno.ESTALE,),
}


def reason(error: OSError) -> str:
    """What the system said, and what mends just that: `No space left on device; make room on that disk`."""
    said = error.strerror or str(error) or type(error).__name__
    return "; ".join([said, *(fix for fix, numbers in _FIXES.items() if error.errno in numbers)])


def real(path: str | os.PathLike[str]) -> Path:
    """The path with symbolic links resolved, as far as it exists; a link to itself stays, and fails when opened."""
    return Path(os.path.realpath(path))


def left_by_system(name: str) -> bool:
    """Whether a file name is of a file that nobody put there: hidden ones (`._x`, `.DS_Store`), Thumbs.db, desktop.ini.

    macOS writes a `._NAME` beside every file on a disk that is not its own, and into archives.
    """
    return name.startswith(".") or _LITTER.fullmatch(name) is not None


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder, sorted by name, without those `left_by_system`."""
    return sorted(path for path in folder.iterdir() if not left_by_system(path.name) and path.is_file())


def expect_apart(target: Path | None, *sources: Path) -> None:
    """ConfigError where a result would be written over one of the files that it is made from."""
    for source in sources:
        with suppress(OSError):  # one of them is not there
            if target is not None and target.samefile(source):
                raise ConfigError(f"{target}: the result would overwrite what it is made from; choose another name")


def write_durably(path: Path, blocks: Iterable[bytes | memoryview], synced: bool = True) -> None:
    """Replaces a file by the given bytes; a reader, also after a crash, finds the old file or the new one.

    Not synced, a power failure may lose it: one `os.sync()` after ten thousand files costs less than a sync for each.
    Raises OSError, which names the file.
    """
    with atomic_file(path, synced) as descriptor:
        for block in blocks:
            rest = memoryview(block)
            while rest.nbytes:  # one call may write less than it is given, always so beyond 2 GiB
                written = os.write(descriptor, rest)
                if written == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
                rest = rest[written:]


@contextmanager
def atomic_file(path: Path, synced: bool = True) -> Iterator[int]:
    """The descriptor of an empty file to fill, which replaces `path` when the block ends without an exception.

    Else it is removed. `synced` and errors as in `write_durably`.
    """
    temporary = temporary_beside(path)
    try:
        # Opened first: a directory that cannot be opened must be noticed while the old file is still in place.
        with _opened(path.parent) as directory:
            try:
                with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                    yield descriptor
                    if synced:
                        os.fsync(descriptor)
                temporary.replace(path)
                if synced:
                    _sync(directory)
            except BaseException:
                # The first error is the one to report; a leftover is swept at the next start.
                with suppress(OSError):
                    temporary.unlink()
                raise
    except OSError as error:
        if error.filename not in (None, str(temporary)):  # something that was read meanwhile
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sweep_temporaries(directory: Path) -> list[Path]:
    """Removes the temporaries that killed programs left in a directory, and returns their paths.

    A write in progress has one too: call it where nobody else writes to the directory. Raises OSError for a directory
    that cannot be read or a temporary that cannot be removed.
    """
    files = sorted(file for file in Path(directory).iterdir() if file.is_file() and not file.is_symlink())
    orphans = [file for file in files if _TEMPORARY.fullmatch(file.name)]
    for orphan in orphans:
        orphan.unlink()
    return orphans


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to fill, which becomes `target` when the block ends without an exception.

    Else it is removed; what a killed program left is removed by the next that makes the same target. Raises DataError
    where `target` holds something already, other than what a file browser leaves, and OSError where the system refuses.
    """
    there = list(target.iterdir()) if target.is_dir() else []
    litter = [path for path in there if path.is_file() and _LITTER.fullmatch(path.name)]
    if target.is_symlink() or (target.exists() and not target.is_dir()) or len(litter) < len(there):
        raise DataError(f"{target}: is there already, and is left as it is; choose a new or an empty folder.")
    with scratch_folder(target) as temporary:
        try:
            yield temporary
        except OSError as error:
            if error.errno is None:  # a library's, as Pillow's of a disk that is full: words alone
                raise OSError(errno.EIO, str(error), str(target)) from error
            # The temporary folder is gone when somebody reads its name.
            error.filename = str(error.filename or target).replace(str(temporary), str(target))
            raise
        # Some ten thousand files: one sync of everything costs less than one for each. Before the rename, or a power
        # failure could leave a whole folder of empty files.
        os.sync()
        for path in litter:
            path.unlink(missing_ok=True)
        temporary.rename(target)
        with _opened(target.parent) as directory:
            _sync(directory)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, on the same disk, that is gone afterwards unless the block has renamed it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_folders(target)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        with _opened(temporary) as descriptor:
            # The lock tells `_sweep_folders` of another program that this one is alive; it goes with the process.
            lock(descriptor, temporary)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Within it this process holds the lock of a folder; False where another has it. A killed process leaves no mark.

    NFS locks no folders, but files: there it is `.lock` in the folder.
    """
    with ExitStack() as stack:
        descriptor = stack.enter_context(_opened(folder))
        try:
            alone = _try_lock(descriptor)
        except OSError:
            file = folder / ".lock"
            alone = lock(stack.enter_context(_opened(file, os.O_RDWR | os.O_CREAT)), file)
        yield alone


def _try_lock(descriptor: int, wait: bool = False) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def lock(descriptor: int, what: Path, wait: bool = False) -> bool:
    """Takes the lock of an open file or folder, which the system drops when it is closed or the process ends.

    False where another process holds it and `wait` is not set. A file system without locks (Lustre without -o flock,
    NFS without lockd) is no obstacle: a warning asks that nobody else write there.
    """
    try:
        return _try_lock(descriptor, wait)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _tell_unlocked(what.parent, error.strerror)
        return True


@functools.cache
def _tell_unlocked(folder: Path, said: str) -> None:
    log.warning("%s: this file system has no locks (%s); see that no other program writes there", folder, said)


def temporary_beside(path: Path) -> Path:
    """A name that `sweep_temporaries` knows, for what is to be renamed to `path`."""
    return path.parent / f".{path.name[:_NAME_KEPT]}.{secrets.token_hex(8)}.segnet-tmp"


def _sync(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of network file systems that cannot sync a directory
            raise


def _sweep_folders(target: Path) -> None:
    """Removes what killed programs left of a folder beside `target`."""
    pattern = re.compile(rf"\.{re.escape(target.name[:_NAME_KEPT])}\.[0-9a-f]{{16}}\.segnet-tmp")
    for folder in target.parent.iterdir():
        if pattern.fullmatch(folder.name) and not folder.is_symlink() and folder.is_dir():
            with _opened(folder) as descriptor:
                try:
                    abandoned = _try_lock(descriptor)  # else somebody is filling it
                except OSError:  # the file system knows no locks
                    continue
                if abandoned:
                    shutil.rmtree(folder)
