"""A folder that appears whole or not at all."""

import signal
import subprocess
import sys

import pytest

from segnet_scratch.errors import DataError
from segnet_scratch.files import _sweep_folders, whole_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from segnet_scratch.files import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end(tmp_path):
    target = tmp_path / "a/b"
    with whole_folder(target) as folder:
        (folder / "file").write_text("content")
        assert not target.exists()
    assert names(target.parent) == ["b"]
    assert names(target) == ["file"]


def test_what_a_file_browser_leaves_is_nothing(tmp_path):
    litter = [".DS_Store", "._file", "Thumbs.db", "desktop.ini"]
    for name in litter:
        (tmp_path / name).write_text("")
    with whole_folder(tmp_path) as folder:
        (folder / "file").write_text("content")
        assert names(tmp_path) == sorted(litter)  # as long as nothing takes its place
    assert names(tmp_path) == ["file"]
    for name in (".gitignore", "._"):  # somebody's; a folder
        target = tmp_path / f"b{name}"
        target.mkdir()
        (target / name).mkdir() if name == "._" else (target / name).write_text("")
        with pytest.raises(DataError, match="is there already"), whole_folder(target):
            pass
        assert names(target) == [name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    def fill():
        with whole_folder(tmp_path / "b") as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "b")], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    (tmp_path / f"{left}.mine").mkdir()
    (tmp_path / left.replace(".b.", ".other.")).mkdir()
    with whole_folder(tmp_path / "b"):
        pass
    assert names(tmp_path) == sorted([f"{left}.mine", left.replace(".b.", ".other."), "b"])


def test_one_that_is_being_filled_is_not_swept(tmp_path):
    with whole_folder(tmp_path / "b") as first:
        (first / "file").write_text("content")
        _sweep_folders(tmp_path / "b")
        assert names(first) == ["file"]
    assert names(tmp_path / "b") == ["file"]


def test_the_first_to_end_wins(tmp_path):
    def fill_both():
        with whole_folder(tmp_path / "b") as second:
            (second / "second").write_text("content")
            with whole_folder(tmp_path / "b") as first:
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
        with pytest.raises(DataError, match=name), whole_folder(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == (tmp_path / "full/file").read_text() == "mine"
