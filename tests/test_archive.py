"""Archives: what is taken, and hostile ones, of which nothing lands outside of the target."""

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.data import encoded, noise, small_source

from segnet_scratch import data
from segnet_scratch.data.download import install as install_module
from segnet_scratch.data.download.install import VOC2012, install_voc2012
from segnet_scratch.data.download.sources import read_files
from segnet_scratch.data.palette import indexed_picture
from segnet_scratch.errors import DataError

PREFIX = VOC2012.prefix
MASK = np.arange(20 * 30, dtype=np.int64).reshape(20, 30) % 21


def mask_bytes() -> bytes:
    stream = io.BytesIO()
    indexed_picture(MASK).save(stream, format="PNG")
    return stream.getvalue()


def voc_files() -> dict[str, bytes]:
    """A VOC2012 of three images as its archive holds it, with some of what is not taken."""
    files = {}
    for seed, name in enumerate(("2007_000001", "2007_000002", "2008_000003")):
        files[f"JPEGImages/{name}.jpg"] = encoded(noise(20, 30, seed), "JPEG")
        files[f"SegmentationClass/{name}.png"] = mask_bytes()
        files[f"SegmentationObject/{name}.png"] = mask_bytes()
        files[f"Annotations/{name}.xml"] = b"<annotation/>"
    files["ImageSets/Segmentation/train.txt"] = b"2007_000001\n2007_000002\n"
    files["ImageSets/Segmentation/val.txt"] = b"2008_000003\n"
    files["ImageSets/Main/cat_train.txt"] = b"2007_000001 -1\n"
    return {f"{PREFIX}/{name}": content for name, content in files.items()}


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(members, compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if compressed else "w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def honest() -> list[tuple[tarfile.TarInfo, bytes]]:
    folders = [member(f"{PREFIX}/{name}", type=tarfile.DIRTYPE) for name in ("JPEGImages", "SegmentationClass")]
    return [*folders, *(member(name, content) for name, content in voc_files().items())]


@pytest.fixture
def install(tmp_path):
    """Puts an archive into a folder, with the right checksum, and installs it; returns root or raises."""
    folder = tmp_path / "outer" / "data"

    def run(content: bytes, **change):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOC2012.file).write_bytes(content)
        return install_voc2012(folder, source=replace(small_source(VOC2012, content), **change))

    run.folder = folder
    return run


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


WANTED = {name.removeprefix(PREFIX + "/") for name in voc_files() if "Object" not in name and "Main" not in name}


@pytest.mark.parametrize("compressed", [False, True])
def test_the_files_of_the_list_are_unpacked_and_no_others(install, compressed):
    root = install(tar(honest(), compressed))
    assert root == install.folder / PREFIX
    assert everything(root) == WANTED
    for name, content in voc_files().items():
        if name.removeprefix(PREFIX + "/") in WANTED:
            assert (install.folder / name).read_bytes() == content
    dataset = data.VOCDataset(install.folder, "train")
    np.testing.assert_array_equal(dataset.sample(0)[1], MASK)
    assert everything(install.folder) == {VOC2012.file} | {f"{PREFIX}/{name}" for name in WANTED}


def test_repeating_it_changes_nothing_and_needs_no_archive(install):
    content = tar(honest())
    root = install(content)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    (install.folder / VOC2012.file).unlink()
    assert install_voc2012(install.folder) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_root_that_is_not_whole_is_named(install):
    root = install(tar(honest()))
    (root / "JPEGImages/2008_000003.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 1 images are missing[\s\S]*move .* away"):
        install_voc2012(install.folder)


def test_permissions_and_owners_of_the_archive_count_for_nothing(install):
    members = [(info, content) for info, content in honest()]
    for info, _ in members:
        info.mode, info.uid, info.gid, info.mtime = 0o6777, 4711, 4711, 0
    root = install(tar(members))
    path = root / "JPEGImages/2007_000001.jpg"
    assert path.stat().st_mode & 0o7111 == 0
    assert path.stat().st_uid == os.getuid()
    assert path.stat().st_mtime > 1e9


def sparse() -> bytes:
    """An archive whose member claims a hundred gigabytes of hole in GNU's old sparse format."""
    info = tarfile.TarInfo(f"{PREFIX}/JPEGImages/hole.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"00000000000\0" * 2  # one piece: offset and length 0
    block[483:495] = b"1351035564000"[:12]  # real size, octal
    block[148:156] = b"        "
    block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
    return bytes(block) + bytes(1024)


def negative_size() -> bytes:
    """A header whose size is negative: a reader that seeks by it never ends."""
    info = tarfile.TarInfo(f"{PREFIX}/JPEGImages/a.jpg")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + (-2048 & 0xFFFF).to_bytes(2, "big")
    block[148:156] = b"        "
    block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
    return tar(honest())[:-10240] + bytes(block) + bytes(1024)


def huge_header(kind: bytes) -> bytes:
    """An extended header or a long name that claims ten gigabytes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 10 << 30
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(4 << 20)


def chain() -> bytes:
    """Ten thousand extended headers in a row."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 0
    return info.tobuf() * 10_000


IMAGE = f"{PREFIX}/JPEGImages/x.jpg"
OUTSIDE = "escaped.jpg"
HOSTILE = {
    "symbolic link": tar([*honest(), member(IMAGE, type=tarfile.SYMTYPE, linkname="../../../../target")]),
    "hard link": tar([*honest(), member(IMAGE, type=tarfile.LNKTYPE, linkname="../../../target")]),
    "character device": tar([*honest(), member(IMAGE, type=tarfile.CHRTYPE, devmajor=1, devminor=3)]),
    "block device": tar([*honest(), member(IMAGE, type=tarfile.BLKTYPE, devmajor=8, devminor=0)]),
    "pipe": tar([*honest(), member(IMAGE, type=tarfile.FIFOTYPE)]),
    "folder named like a file": tar([*honest(), member(IMAGE, type=tarfile.DIRTYPE)]),
    "large together": tar([*honest(), *(member(IMAGE.replace("x", f"x{n}"), bytes(300_000)) for n in range(4))]),
    "sparse": sparse(),
    "negative size": negative_size(),
    "huge extended header": huge_header(tarfile.XHDTYPE),
    "huge long name": huge_header(tarfile.GNUTYPE_LONGNAME),
    "huge long link": huge_header(tarfile.GNUTYPE_LONGLINK),
    "headers in a row": chain(),
    "cut in a file": tar(honest())[: 10 * 512 + 100],
    "cut compressed": tar(honest(), compressed=True)[:-100],
    "damaged compressed": tar(honest(), compressed=True)[:100] + bytes(200),
    "no archive": b"<html>moved</html>" * 1000,
    "empty": b"",
    "zeros": bytes(10240),
    "without lists": tar([entry for entry in honest() if not entry[0].name.endswith(".txt")]),
    "without images": tar([entry for entry in honest() if "JPEG" not in entry[0].name]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing(install, tmp_path, name):
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer/target").write_bytes(b"precious")
    before = everything(tmp_path)
    with pytest.raises(DataError, match=rf"{VOC2012.file}|VOC2012") as caught:
        install(HOSTILE[name])
    assert everything(tmp_path) == before | {f"outer/data/{VOC2012.file}"}
    assert not list((install.folder / "VOCdevkit").glob("*"))
    assert (tmp_path / "outer/target").read_bytes() == b"precious"
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "segnet-tmp" not in str(caught.value)


def test_what_is_not_on_the_list_is_passed_over(install, tmp_path):
    (tmp_path / "outer").mkdir()
    elsewhere = (
        "{}/JPEGImages/../../../../{}",
        "{}/../VOC2012/JPEGImages/{}",
        "/tmp/{1}",
        "C:/{1}",
        "..\\..\\{1}",
        "../{1}",
    )
    harmless = [
        member(f"{PREFIX}/JPEGImages", type=tarfile.SYMTYPE, linkname="../../../../"),
        member("VOCdevkit/link", type=tarfile.SYMTYPE, linkname="/etc"),
        member("VOCdevkit/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        *(member(name.format(PREFIX, OUTSIDE), b"x") for name in elsewhere),
    ]
    root = install(tar([*harmless, *honest()]))
    assert everything(root) == WANTED
    assert not (root / "JPEGImages").is_symlink()
    assert everything(tmp_path) == {f"outer/data/{VOC2012.file}"} | {f"outer/data/{PREFIX}/{name}" for name in WANTED}
    assert not Path("/tmp", OUTSIDE).exists()


def test_a_wrong_checksum_unpacks_nothing(install):
    with pytest.raises(DataError, match="another file than expected"):
        install(tar(honest()), md5="0" * 32)
    assert everything(install.folder) == {VOC2012.file}


def test_short_room_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(install_module.shutil, "disk_usage", lambda _: Usage())
    with pytest.raises(DataError, match=r"4\.2 GB of free space expected.*got 3\.0 GB"):
        install_voc2012(tmp_path / "a/b")
    assert not (tmp_path / "a").exists()


class Usage:
    free = 3_000_000_000


def test_an_interrupted_unpacking_leaves_nothing_and_can_be_repeated(install, monkeypatch):
    content = tar(honest())

    def breaking(*arguments):
        for number, item in enumerate(read_files(*arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(install_module, "read_files", breaking)
        with pytest.raises(KeyboardInterrupt):
            install(content)
    assert everything(install.folder) == {VOC2012.file}
    left = install.folder / "VOCdevkit/.VOC2012.0123456789abcdef.segnet-tmp"  # of a process that was killed
    (left / "JPEGImages").mkdir(parents=True)
    other = install.folder / "VOCdevkit/.VOC2012.backup"
    other.mkdir()
    install(content)
    assert not left.exists()
    assert other.is_dir()
    assert everything(install.folder / PREFIX) == WANTED
