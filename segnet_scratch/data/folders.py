"""What lies in a folder, without what operating systems leave there."""

from pathlib import Path

_LEFT_BY_WINDOWS = ("thumbs.db", "ehthumbs.db", "desktop.ini")


def left_by_system(name: str) -> bool:
    """Whether a file name is of a file that nobody put there: hidden ones (`._x`, `.DS_Store`), Thumbs.db, desktop.ini.

    macOS writes a `._NAME` beside every file on a disk that is not its own, and into archives.
    """
    return name.startswith(".") or name.lower() in _LEFT_BY_WINDOWS


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder, sorted by name, without those `left_by_system`."""
    return sorted(path for path in folder.iterdir() if not left_by_system(path.name) and path.is_file())
