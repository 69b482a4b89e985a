"""Caches of decoded samples: the same bits as without, no more memory than allowed, never a stale or damaged file."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.data import encoded, noise

from segnet_scratch import data
from segnet_scratch.data import VOCDataset
from segnet_scratch.data import cache as cache_module
from segnet_scratch.data.cache import MemoryCachedDataset, open_dataset
from segnet_scratch.errors import DataError

SAMPLE_BYTES = 20 * 30 * 4  # of an image and mask of the fixture


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/data"


@pytest.fixture
def decoded(monkeypatch):
    """The indices that are decoded from here on, in order."""
    indices = []
    sample = VOCDataset.sample

    def counting(self, index):
        indices.append(index)
        return sample(self, index)

    monkeypatch.setattr(VOCDataset, "sample", counting)
    return indices


def equal(first, second) -> bool:
    return first[2] == second[2] and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first[:2], second[:2], strict=True)
    )


@pytest.mark.parametrize("mode", ["none", "memory", "disk"])
def test_samples_are_those_of_the_data_set(voc, mode):
    plain, cached = VOCDataset(voc, "train"), open_dataset(voc, "train", mode)
    assert isinstance(cached, VOCDataset)
    for attribute in ("root", "split", "ids", "names", "classes"):
        assert getattr(cached, attribute) == getattr(plain, attribute)
    assert len(cached) == len(plain) == 8
    for _ in range(2):
        assert all(equal(cached.sample(index), plain.sample(index)) for index in range(8))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_nothing_is_decoded_twice(voc, mode, decoded):
    for _ in range(2):
        cached = open_dataset(voc, "train", mode)
        for index in (*range(8), *range(8)):
            cached.sample(index)
    assert sorted(decoded) == sorted([*range(8)] * (2 if mode == "memory" else 1))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_what_is_cached_cannot_be_written_to(voc, mode):
    cached = open_dataset(voc, "train", mode)
    for _ in range(2):
        for array in cached.sample(0)[:2]:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    assert equal(cached.sample(0), VOCDataset(voc, "train").sample(0))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_damaged_samples_are_named(voc, mode):
    (voc / "JPEGImages/c.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.jpg.*0 bytes"):
        open_dataset(voc, "train", mode).sample(2)


# --- in memory -----------------------------------------------------------------------------------


def test_the_limit_of_memory_holds(voc, decoded):
    cached = MemoryCachedDataset(voc, "train", limit=3 * SAMPLE_BYTES + 100)
    for _ in range(3):
        for index in range(8):
            cached.sample(index)
    assert cached.held == 3 * SAMPLE_BYTES
    assert sorted(decoded) == sorted([0, 1, 2] + 3 * [3, 4, 5, 6, 7])


def test_threads_do_not_count_a_sample_twice(voc, monkeypatch):
    cached = MemoryCachedDataset(voc, "train")
    barrier, sample = threading.Barrier(4), VOCDataset.sample

    def together(self, index):
        barrier.wait(5)
        return sample(self, index)

    monkeypatch.setattr(VOCDataset, "sample", together)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(cached.sample, [0] * 4))
    assert all(equal(result, results[0]) for result in results)
    assert cached.held == SAMPLE_BYTES


# --- on disk -------------------------------------------------------------------------------------


def all_of(dataset):
    return [dataset.sample(index) for index in range(len(dataset))]


@pytest.fixture
def files(voc, cache_folder):
    """The files of a cache that has been filled."""
    all_of(open_dataset(voc, "train", "disk"))
    return sorted(cache_folder.rglob("*.sample"))


def touch(path: Path) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def other_image(root):
    (root / "JPEGImages/b.jpg").write_bytes(encoded(noise(seed=99), "JPEG"))


def other_mask(root):
    data.save_indexed_png(root / "SegmentationClass/b.png", np.full((20, 30), 7, np.uint8))


def touched_image(root):
    touch(root / "JPEGImages/b.jpg")


def touched_mask(root):
    touch(root / "SegmentationClass/b.png")


def other_suffix(root):
    (root / "JPEGImages/b.jpg").unlink()
    (root / "JPEGImages/b.png").write_bytes(encoded(noise(seed=98), "PNG"))


def other_classes(root):
    (root / "labels.txt").write_text("\n".join(f"c{n}" for n in range(30)))


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        *((change, [1]) for change in (other_image, other_mask, touched_image, touched_mask, other_suffix)),
        (other_classes, [*range(8)]),
    ],
)
def test_a_stale_sample_is_made_anew(voc, files, decoded, change, anew):
    change(voc)
    decoded.clear()
    cached = all_of(open_dataset(voc, "train", "disk"))
    assert decoded == anew
    assert all(equal(*pair) for pair in zip(cached, all_of(VOCDataset(voc, "train")), strict=True))
    assert sorted(files[0].parent.iterdir()) == files


def test_another_decoder_makes_every_sample_anew(voc, files, decoded, monkeypatch):
    decoded.clear()
    monkeypatch.setattr(cache_module.PIL, "__version__", "0.0")
    all_of(open_dataset(voc, "train", "disk"))
    assert decoded == [*range(8)]


def test_every_damaged_or_missing_byte_is_noticed(voc, files):
    plain, content = VOCDataset(voc, "train").sample(2), files[2].read_bytes()
    rng = np.random.default_rng(0)
    for place in (*rng.integers(0, len(content), 40).tolist(), *range(0, 200, 5)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        for wrong in (damaged, content[:place]):
            files[2].write_bytes(wrong)
            assert equal(open_dataset(voc, "train", "disk").sample(2), plain)
            assert files[2].read_bytes() == content


def test_a_full_disk_is_told_with_the_way_out(voc, monkeypatch):
    def full(path, blocks, synced):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_durably", full)
    with pytest.raises(DataError, match=r"No space left.*SEGNET_CACHE"):
        open_dataset(voc, "train", "disk").sample(0)
