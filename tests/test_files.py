"""What every file of this program goes through: temporaries, their names, what the system says when it refuses."""

import errno
import os
import signal
import stat

import pytest
from support.commands import process

from segnet_scratch import files
from segnet_scratch.errors import ConfigError, DataError, TrainingError
from segnet_scratch.files import atomic_folder, expect_apart, lock, reason, sweep_temporaries, write_durably
from segnet_scratch.run_folder import RunFolder


@pytest.mark.parametrize("letter", ["n", "\u00e9", "\U0001f4c4"])
def test_a_name_as_long_as_the_file_system_takes(tmp_path, letter):
    name = letter * (255 // len(letter.encode()))
    write_durably(tmp_path / name, [b"content"])
    with atomic_folder(tmp_path / f"{name[:-1]}o") as folder:
        (folder / "file").touch()
    assert (tmp_path / name).read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "only be read"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOENT, "check the path"),
    ],
)
def test_each_refusal_has_its_own_fix(number, fix):
    said = reason(OSError(number, os.strerror(number)))
    assert said.startswith(f"{os.strerror(number)}; ")
    assert fix in said
    assert ("room" in said) == (number == errno.ENOSPC)


def test_an_error_that_the_system_did_not_make_is_shown_as_it_is():
    assert reason(OSError("encoder error -2")) == "encoder error -2"


def test_the_error_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("segnet_scratch.files.os.write", full)
        with pytest.raises(OSError, match="No space") as raised:
            write_durably(tmp_path / "a", [b"x"])
    assert raised.value.filename == str(tmp_path / "a")
    assert sweep_temporaries(tmp_path) == []


def test_an_error_of_what_is_read_meanwhile_names_that(tmp_path):
    def blocks():
        yield b"x"
        yield (tmp_path / "source").read_bytes()

    with pytest.raises(FileNotFoundError) as raised:
        write_durably(tmp_path / "a", blocks())
    assert raised.value.filename == str(tmp_path / "source")


def test_a_lock_keeps_another_process_out_and_goes_with_its_holder(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from segnet_scratch.files import lock\n"
        "print(lock(os.open(sys.argv[1], os.O_RDONLY), Path(sys.argv[1])))"
    )

    def other():
        return process(tmp_path, code=code).stdout

    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert lock(descriptor, tmp_path)
    assert other() == "False\n"
    os.close(descriptor)
    assert other() == "True\n"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog, number, wait):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("segnet_scratch.files.fcntl.flock", flock)
    files._tell_unlocked.cache_clear()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert lock(descriptor, tmp_path, wait)
    os.close(descriptor)
    assert "no locks" in caplog.text
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "file").touch()
    assert (tmp_path / "b" / "file").exists()


def test_a_result_may_not_be_written_over_what_it_is_made_from(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("a")
    expect_apart(None, tmp_path / "a")
    expect_apart(tmp_path / "new", tmp_path / "a")
    for target in (tmp_path / "a", tmp_path / "link", tmp_path / "x" / ".." / "a"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="would overwrite"):
            expect_apart(target, tmp_path / "b", tmp_path / "a")


def test_a_folder_without_a_lock_is_told_and_nothing_is_closed_twice(tmp_path, monkeypatch):
    def no_lock(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.fcntl, "flock", no_lock)
    (tmp_path / ".lock").mkdir()  # cannot be opened to write
    with pytest.raises(TrainingError, match=r"\.lock: cannot be locked: Is a directory"), RunFolder(tmp_path).in_use():
        pass


def test_where_folders_cannot_be_locked_a_file_in_them_is(tmp_path, monkeypatch):
    """NFS makes locks of byte ranges, for which a folder cannot be opened."""
    flock = files.fcntl.flock

    def of_files(descriptor, operation):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", of_files)
    with files.locked(tmp_path) as first, files.locked(tmp_path) as second:
        assert (first, second) == (True, False)
    with files.locked(tmp_path) as again:
        assert again


# A folder that appears whole or not at all

KILLED = """
import os, signal, sys
from pathlib import Path
from segnet_scratch.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end(tmp_path):
    target = tmp_path / "a/b"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("content")
        assert not target.exists()
    assert names(target.parent) == ["b"]
    assert names(target) == ["file"]


def test_what_a_file_browser_leaves_is_nothing(tmp_path):
    litter = [".DS_Store", "._file", "Thumbs.db", "desktop.ini"]
    for name in litter:
        (tmp_path / name).write_text("")
    with atomic_folder(tmp_path) as folder:
        (folder / "file").write_text("content")
        assert names(tmp_path) == sorted(litter)  # as long as nothing takes its place
    assert names(tmp_path) == ["file"]
    for name in (".gitignore", "._"):  # somebody's; a folder
        target = tmp_path / f"b{name}"
        target.mkdir()
        (target / name).mkdir() if name == "._" else (target / name).write_text("")
        with pytest.raises(DataError, match="is there already"), atomic_folder(target):
            pass
        assert names(target) == [name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    def fill():
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    assert process(tmp_path / "b", code=KILLED).returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    (tmp_path / f"{left}.mine").mkdir()
    (tmp_path / left.replace(".b.", ".other.")).mkdir()
    with atomic_folder(tmp_path / "b"):
        pass
    assert names(tmp_path) == sorted([f"{left}.mine", left.replace(".b.", ".other."), "b"])


def test_one_that_is_being_filled_is_not_swept(tmp_path):
    with atomic_folder(tmp_path / "b") as first:
        (first / "file").write_text("content")
        files._sweep_folders(tmp_path / "b")
        assert names(first) == ["file"]
    assert names(tmp_path / "b") == ["file"]


def test_a_disk_that_is_full_names_the_folder(tmp_path):
    with pytest.raises(OSError, match=r"No space .*new'$"), atomic_folder(tmp_path / "new"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write: without a name
    with pytest.raises(OSError, match=r"encoder error -2.*new'$"), atomic_folder(tmp_path / "new"):
        raise OSError("encoder error -2 when writing image file")  # as of Pillow: words alone
    with pytest.raises(OSError, match=r"new/inside'$"), atomic_folder(tmp_path / "new") as folder:
        (folder / "inside").rmdir()  # there is none


def test_the_first_to_end_wins(tmp_path):
    def fill_both():
        with atomic_folder(tmp_path / "b") as second:
            (second / "second").write_text("content")
            with atomic_folder(tmp_path / "b") as first:
                (first / "first").write_text("content")

    with pytest.raises(OSError, match="not empty"):
        fill_both()
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["first"]


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "full", "link"):
        with pytest.raises(DataError, match=name), atomic_folder(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == (tmp_path / "full/file").read_text() == "mine"
