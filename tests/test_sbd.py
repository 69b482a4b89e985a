"""SBD merged into VOC2012: a synthetic archive of a few images, in the form of the real one."""

import io
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
from PIL import Image
from support.data import empty_voc, encoded, noise, small_source

from segnet_scratch import data
from segnet_scratch.cli import data as cli_data
from segnet_scratch.data import VOCDataset, read_mask, voc_palette
from segnet_scratch.data.download import sbd as sbd_module
from segnet_scratch.data.download.install import SBD, VOC2012, install_sbd, install_voc2012
from segnet_scratch.data.verify import verify
from segnet_scratch.errors import DataError, MissingLibraryError

scipy_io = pytest.importorskip("scipy.io", reason="SBD's masks are MATLAB files, which scipy (extra test) writes")

SIZE = (20, 30)
# In VOC: a, b for training, v for validation, n without a mask. SBD has a, n, its own image o, and v.
SBD_IDS = ("2008_a", "2008_n", "2008_o", "2008_v")


def labels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 21, SIZE).astype(np.uint8)


def matlab(segmentation: np.ndarray) -> bytes:
    """A .mat file as SBD's: the struct GTcls with boundaries, segmentation and the classes present."""
    stream = io.BytesIO()
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros(SIZE, np.uint8)]] * 20
    struct = {
        "Boundaries": boundaries,
        "Segmentation": segmentation,
        "CategoriesPresent": np.array([[1], [2]], np.uint8),
    }
    scipy_io.savemat(stream, {"GTcls": struct}, do_compression=True)
    return stream.getvalue()


def sbd_files() -> dict[str, bytes]:
    files = {"train.txt": b"2008_a\n2008_v\n", "val.txt": b"2008_n\n2008_o\n"}
    for seed, name in enumerate(SBD_IDS):
        files[f"cls/{name}.mat"] = matlab(labels(100 + seed))
        files[f"inst/{name}.mat"] = b"instances, not taken"
        files[f"img/{name}.jpg"] = encoded(noise(*SIZE, seed), "JPEG")
    return files


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"benchmark_RELEASE/dataset/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def root(tmp_path):
    root = empty_voc(tmp_path / "VOCdevkit/VOC2012")
    for seed, name in enumerate(("2008_a", "2008_b", "2008_v", "2008_n")):
        (root / f"JPEGImages/{name}.jpg").write_bytes(encoded(noise(*SIZE, 10 + seed), "JPEG"))
        if name != "2008_n":
            data.save_indexed_png(root / f"SegmentationClass/{name}.png", labels(seed))
    (root / "ImageSets/Segmentation/train.txt").write_text("2008_b\n2008_a\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2008_v\n")
    return root


@pytest.fixture
def merge(tmp_path, root):
    """Merges an archive with these files into the VOC2012."""

    def run(files: dict[str, bytes]):
        archive = packed(files)
        (tmp_path / SBD.file).write_bytes(archive)
        return install_sbd(tmp_path, source=small_source(SBD, archive))

    return run


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_sbd_adds_what_voc_lacks_and_nothing_of_val(merge, root):
    before = contents(root)
    merged = merge(sbd_files())
    assert (merged.root, merged.ids, merged.added) == (root, 4, 2)
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text() == "2008_b\n2008_a\n2008_n\n2008_o\n"
    after = contents(root)
    assert {name: after[name] for name in before} == before, "what was there stays as it was"
    assert set(after) - set(before) == {
        "ImageSets/Segmentation/train_aug.txt",
        "JPEGImages/2008_o.jpg",
        "SegmentationClass/2008_n.png",
        "SegmentationClass/2008_o.png",
    }
    assert after["JPEGImages/2008_o.jpg"] == sbd_files()["img/2008_o.jpg"]
    for name, seed in (("2008_n", 101), ("2008_o", 102)):
        np.testing.assert_array_equal(read_mask(root / f"SegmentationClass/{name}.png", 21), labels(seed))
        with Image.open(root / f"SegmentationClass/{name}.png") as picture:
            np.testing.assert_array_equal(np.array(picture.convert("RGB")), voc_palette()[labels(seed)])
    np.testing.assert_array_equal(VOCDataset(root, "train_aug").sample(1)[1], labels(0))  # VOC's, not SBD's
    assert {finding.code for finding in verify(root).findings} <= {"image-tiny"}


def test_the_ids_of_val_are_left_out_though_sbd_trains_on_them(merge, root):
    (root / "SegmentationClass/2008_v.png").unlink()
    merge(sbd_files())
    assert not (root / "SegmentationClass/2008_v.png").exists(), "no score by SBD's masks"
    val = set((root / "ImageSets/Segmentation/val.txt").read_text().split())
    assert "2008_v" in sbd_files()["train.txt"].decode()
    assert not val & set(VOCDataset(root, "train_aug").ids)


@pytest.mark.parametrize("backwards", [False, True])
def test_repeating_it_changes_nothing(merge, root, backwards):
    files = sbd_files()
    merge(dict(reversed(files.items())) if backwards else files)
    before = contents(root)
    assert merge(files).added == 0
    assert contents(root) == before


def test_an_interrupted_merge_writes_no_list_and_is_completed_by_the_next(merge, root, monkeypatch):
    write, calls = sbd_module.write_durably, []

    def breaking(path, blocks, synced):
        calls.append(path)
        if len(calls) == 2:
            (path.parent / f".{path.name}.0123456789abcdef.segnet-tmp").write_bytes(blocks[0][:10])
            raise KeyboardInterrupt
        write(path, blocks, synced)

    with monkeypatch.context() as patch:
        patch.setattr(sbd_module, "write_durably", breaking)
        with pytest.raises(KeyboardInterrupt):
            merge(sbd_files())
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()
    merge(sbd_files())
    assert len(VOCDataset(root, "train_aug")) == 4
    assert not list(root.rglob("*.segnet-tmp"))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"cls/2008_n.mat": b"MATLAB 5.0 MAT-file" + bytes(200)}, "2008_n.mat: no class map"),
        ({"cls/2008_n.mat": matlab(labels(101))[:200]}, "2008_n.mat: no class map"),
        ({"cls/2008_n.mat": matlab(np.full(SIZE, 21, np.uint8))}, r"2008_n.mat: .* 0\.\.20, got .* 21\.\.21"),
        ({"cls/2008_n.mat": matlab(np.full(SIZE, -1, np.int16))}, r"2008_n.mat: .* 0\.\.20, got .* -1\.\.-1"),
        ({"cls/2008_n.mat": matlab(np.full(SIZE, 0.5))}, "2008_n.mat: expected a map of .*, got float64"),
        ({"cls/2008_n.mat": matlab(np.zeros((0, 0), np.uint8))}, "2008_n.mat: expected a map"),
        ({"cls/2008_n.mat": matlab(labels(1)[:19])}, "2008_n.png: mask of 19 x 30"),
        ({"train.txt": b"2008_a\n2008_missing\n"}, "1 of the 4 ids in its lists have no mask"),
        ({"train.txt": b"../../etc/passwd\n"}, "1 of the 3 ids"),
        ({"img/2008_o.jpg": b"no picture"}, "2008_o.jpg: cannot be read"),
    ],
)
def test_damage_is_named_and_no_list_is_written(merge, root, change, hint):
    with pytest.raises(DataError, match=hint):
        merge({**sbd_files(), **change})
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()


def test_another_archive_is_no_sbd(merge, root):
    with pytest.raises(DataError, match="expected SBD's"):
        merge({"readme.txt": b"nothing"})


def test_voc_comes_first(tmp_path):
    with pytest.raises(DataError, match="download that into the same folder first"):
        install_sbd(tmp_path / "empty")


def test_without_scipy_the_extra_is_named(merge, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'segnet_scratch\[sbd\]'"):
        merge(sbd_files())


def test_the_command_downloads_both(tmp_path, root, segnet, server, monkeypatch):
    """From an empty folder to train_aug, by the commands that a user types, from a server on this machine."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(root, "VOCdevkit/VOC2012")
    voc, sbd = stream.getvalue(), packed(sbd_files())
    voc_url = server.url("voc.tar", content=voc, cuts=[5000])
    sbd_url = server.url("sbd.tgz", content=sbd)
    monkeypatch.setattr(cli_data, "install_voc2012", partial(install_voc2012, source=small_source(VOC2012, voc)))
    monkeypatch.setattr(cli_data, "install_sbd", partial(install_sbd, source=small_source(SBD, sbd)))
    monkeypatch.setattr("segnet_scratch.data.download.fetch.time.sleep", lambda _: None)
    target = tmp_path / "new"
    finished = segnet("data", "download", target, "--mirror", "http://127.0.0.1:9/x", "--mirror", voc_url)
    assert finished.code == 0, finished.err
    assert "download ..." in finished.out
    assert f"{target}/VOCdevkit/VOC2012: train 2, val 1 images" in finished.out
    finished = segnet("data", "download", target, "--dataset", "sbd", "--mirror", sbd_url)
    assert finished.code == 0, finished.err
    assert "list train_aug with 4 images, 2 masks added" in finished.out
    assert VOCDataset(target, "train_aug").ids == ("2008_b", "2008_a", "2008_n", "2008_o")
    refused = segnet("data", "download", target, "--dataset", "coco")
    assert refused.code == 2
    failed = segnet("data", "download", tmp_path / "other", "--mirror", server.url("gone", status=[404]))
    assert failed.code == 1
    assert "HTTP 404" in failed.err
    assert "Traceback" not in failed.err
