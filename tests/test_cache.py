"""Caches of decoded samples: the same bits as without, no more memory than allowed, never a stale or damaged file."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import real
from support.data import encoded, noise

from segnet_scratch import data
from segnet_scratch.data import Loader, TrainTransform, VOCDataset, resize_image, resize_mask
from segnet_scratch.data import disk_cache as disk_module
from segnet_scratch.data.cache import open_dataset
from segnet_scratch.data.disk_cache import DiskCachedDataset
from segnet_scratch.data.memory_cache import MemoryCachedDataset
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
def test_training_sees_the_same_batches(voc, mode):
    def batches(dataset):
        return list(Loader(dataset, TrainTransform((16, 24)), 3, seed=5, workers=2).epoch(1))

    for plain, cached in zip(batches(VOCDataset(voc, "train")), batches(open_dataset(voc, "train", mode)), strict=True):
        assert plain.ids == cached.ids
        np.testing.assert_array_equal(plain.images, cached.images)
        np.testing.assert_array_equal(plain.labels, cached.labels)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_what_is_cached_cannot_be_written_to(voc, mode):
    cached = open_dataset(voc, "train", mode)
    for _ in range(2):
        for array in cached.sample(0)[:2]:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    assert equal(cached.sample(0), VOCDataset(voc, "train").sample(0))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_longest_bounds_the_longer_side(voc, mode):
    cached = open_dataset(voc, "train", mode, longest=15)
    image, mask, _ = VOCDataset(voc, "train").sample(3)
    small_image, small_mask, _ = cached.sample(3)
    np.testing.assert_array_equal(small_image, resize_image(image, (10, 15)))
    np.testing.assert_array_equal(small_mask, resize_mask(mask, (10, 15)))
    assert equal(open_dataset(voc, "train", mode, longest=30).sample(3), (image, mask, "d"))
    assert equal(cached.sample(3), (small_image, small_mask, "d"))


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


def other_order(root):
    (root / "ImageSets/Segmentation/train.txt").write_text("b\na\nc\nd\ne\nf\ng\nh\n")


def shorter(root):
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\nc\n")


def other_classes(root):
    (root / "labels.txt").write_text("\n".join(f"c{n}" for n in range(30)))


def other_suffix(root):
    (root / "JPEGImages/b.jpg").unlink()
    (root / "JPEGImages/b.png").write_bytes(encoded(noise(seed=98), "PNG"))


@pytest.mark.parametrize(
    "change",
    [other_image, other_mask, touched_image, touched_mask, other_order, shorter, other_classes, other_suffix],
)
def test_a_stale_file_is_made_anew(voc, cache_folder, decoded, change):
    open_dataset(voc, "train", "disk")
    change(voc)
    decoded.clear()
    cached = open_dataset(voc, "train", "disk")
    assert sorted(decoded) == list(range(len(cached)))
    plain = VOCDataset(voc, "train")
    assert all(equal(cached.sample(index), plain.sample(index)) for index in range(len(plain)))
    assert len(list(cache_folder.glob("*.segnet-cache"))) == 1


def test_another_decoder_makes_the_file_anew(voc, decoded, monkeypatch):
    open_dataset(voc, "train", "disk")
    monkeypatch.setattr(disk_module.PIL, "__version__", "0.0")
    open_dataset(voc, "train", "disk")
    assert len(decoded) == 16


def test_splits_and_sizes_have_files_of_their_own(voc, cache_folder):
    for split, longest in (("train", None), ("val", None), ("train", 15)):
        open_dataset(voc, split, "disk", longest=longest)
    assert len(list(cache_folder.glob("*.segnet-cache"))) == 3


def test_every_damaged_byte_is_noticed(voc):
    """A flipped bit anywhere: the file is made anew, or the sample is refused; never other pixels."""
    plain = VOCDataset(voc, "train")
    file = DiskCachedDataset(voc, "train").file
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    data_end = 8 * SAMPLE_BYTES
    places = [*rng.integers(0, data_end, 20).tolist(), *rng.integers(data_end, len(content), 40).tolist()]
    messages = []
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        cached = DiskCachedDataset(voc, "train")
        for index in range(8):
            try:
                assert equal(cached.sample(index), plain.sample(index))
            except DataError as error:
                messages.append(str(error))
    assert len(messages) == 20
    assert all(message.startswith(f"{file}: damaged at sample '") for message in messages)


@pytest.mark.parametrize("size", [0, 10, 48, 8 * SAMPLE_BYTES, -1])
def test_a_cut_file_is_made_anew(voc, size):
    file = DiskCachedDataset(voc, "train").file
    content = file.read_bytes()
    file.write_bytes(content[:size])
    DiskCachedDataset(voc, "train")
    assert file.read_bytes() == content


def test_the_file_appears_whole_or_not_at_all(voc, cache_folder, monkeypatch):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_dataset(voc, "train", "disk", progress=stop)
    assert [path.name for path in cache_folder.iterdir()] == ["lock"]
    orphan = cache_folder / ".x.segnet-cache.0123456789abcdef.segnet-tmp"
    orphan.write_bytes(b"of a killed process")
    told = []
    open_dataset(voc, "train", "disk", progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 8) for n in range(1, 9)]
    assert not orphan.exists()


def test_a_full_disk_is_told_with_the_way_out(voc, cache_folder, monkeypatch):
    def full(path, blocks):
        next(iter(blocks))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_module, "write_durably", full)
    with pytest.raises(DataError, match=r"No space left.*SEGNET_CACHE"):
        open_dataset(voc, "train", "disk")


def test_an_open_cache_outlives_its_replacement(voc):
    cached = open_dataset(voc, "train", "disk")
    before = [VOCDataset(voc, "train").sample(index) for index in range(8)]
    other_image(voc)
    open_dataset(voc, "train", "disk")
    assert all(equal(cached.sample(index), before[index]) for index in range(8))


def test_of_two_processes_one_makes_the_file(voc, cache_folder):
    program = (
        "import sys; from segnet_scratch.data.cache import open_dataset\n"
        "made = []; open_dataset(sys.argv[1], 'train', 'disk', progress=lambda done, total: made.append(done))\n"
        "print(len(made))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(voc)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert sorted(int(process.communicate(timeout=60)[0]) for process in running) == [0, 0, 8]


@pytest.mark.parametrize("parts", [("VOCdevkit", "VOC2012"), ("CamVid",)])
def test_real_samples_are_bit_equal(parts):
    root = real("data", *parts)
    plain = VOCDataset(root, "val")
    disk, memory = (open_dataset(root, "val", mode) for mode in ("disk", "memory"))
    for index in range(0, len(plain), 5):
        expected = plain.sample(index)
        assert equal(disk.sample(index), expected)
        assert equal(memory.sample(index), expected)
        assert equal(memory.sample(index), expected)
