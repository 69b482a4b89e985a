"""Compiled kernels between runs: damaged, unreadable, shared, read-only, or nowhere to put them."""

import errno
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.commands import process

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime import cache

CONTENT = bytes(range(256)) * 20


@pytest.fixture
def compile_once(monkeypatch, tmp_path):
    """`cached` of one file, with what was compiled so far; folders of this process are those of this test."""
    monkeypatch.setattr(cache, "_own_folder", cache.functools.cache(cache._own_folder.__wrapped__))
    monkeypatch.setattr(cache, "_warn", cache.functools.cache(cache._warn.__wrapped__))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path, made = tmp_path / "cache" / "host" / "relu.so", []

    def run():
        return cache.cached(path, lambda: made.append(1) or CONTENT)

    run.path, run.made = path, made
    return run


def test_what_is_whole_is_not_made_again(compile_once):
    assert compile_once() == compile_once() == compile_once.path
    assert (compile_once.path.read_bytes(), len(compile_once.made)) == (CONTENT, 1)


def test_of_two_that_make_it_at_once_nothing_is_torn(compile_once):
    together = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(cache.cached, compile_once.path, lambda: (together.wait(), CONTENT)[1]) for _ in "ab"]
    assert {job.result() for job in jobs} == {compile_once.path}
    assert compile_once.path.read_bytes() == CONTENT
    assert {path.suffix for path in compile_once.path.parent.iterdir()} == {".so", ".sha256"}


@pytest.mark.parametrize("length", [0, 1, 4096, len(CONTENT) - 1])
@pytest.mark.parametrize("which", ["", ".sha256"])
def test_what_was_cut_off_is_made_again(compile_once, length, which):
    """As a power failure leaves a file that was renamed but never synced."""
    compile_once()
    file = Path(f"{compile_once.path}{which}")
    file.write_bytes(file.read_bytes()[: min(length, file.stat().st_size - 1)])
    assert compile_once().read_bytes() == CONTENT
    assert len(compile_once.made) == 2
    compile_once()
    assert len(compile_once.made) == 2


def test_a_flipped_bit_and_a_file_without_a_checksum(compile_once):
    compile_once()
    compile_once.path.write_bytes(CONTENT[:-1] + b"x")
    assert compile_once().read_bytes() == CONTENT
    Path(f"{compile_once.path}.sha256").unlink()
    compile_once()
    assert len(compile_once.made) == 3


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(compile_once, monkeypatch, caplog, number):
    write = cache.write_durably

    def refused(path, blocks):
        if "cache" in path.parts:
            raise OSError(number, os.strerror(number), str(path))
        write(path, blocks)

    monkeypatch.setattr(cache, "write_durably", refused)
    found = compile_once()
    assert found.read_bytes() == CONTENT
    assert found != compile_once.path
    assert compile_once() == found
    assert len(compile_once.made) == 1
    assert [record.message.count("SEGNET_CACHE") for record in caplog.records] == [1]
    assert os.strerror(number) in caplog.text


def test_a_cache_below_a_file(compile_once):
    compile_once.path.parents[1].write_text("")
    assert compile_once().read_bytes() == CONTENT


def test_nowhere_to_write_at_all(compile_once, monkeypatch):
    compile_once.path.parents[1].write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(compile_once.path))
    with pytest.raises(CompileError, match="SEGNET_CACHE or TMPDIR"):
        compile_once()


def test_what_is_published_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CompileError, match=r"cannot write .*below of the cache: .*set SEGNET_CACHE to a folder"):
        cache.publish(tmp_path / "file" / "below", b"")


def test_a_file_that_may_not_be_read_is_made_anew(compile_once, monkeypatch):
    """Another user's, whose umask keeps everybody out (root, who may run this, reads everything)."""
    compile_once()
    read = Path.read_bytes

    def refused(path):
        if path.parent == compile_once.path.parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    compile_once()
    assert len(compile_once.made) == 2


def test_no_home_folder(compile_once, monkeypatch, caplog):
    def nobody(_):
        raise RuntimeError("Could not determine home directory.")

    for variable in ("SEGNET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    folder = cache.cache_directory()
    assert folder.parent == Path(tempfile.gettempdir())
    assert not cache.outlives_process(folder)
    assert cache.cached(folder / "host" / "a.so", lambda: CONTENT).read_bytes() == CONTENT
    assert "SEGNET_CACHE" in caplog.text


def test_a_process_takes_its_own_folder_with_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from segnet_scratch.runtime.cache import cached\n"
        "print(cached(Path('/dev/null/a.so'), lambda: b'x'))"
    )
    ended = process(code=code, TMPDIR=str(tmp_path))
    assert Path(ended.stdout.strip()).is_relative_to(tmp_path), ended.stderr
    assert list(tmp_path.iterdir()) == []
