"""Data: transforms, the loader's order, the synthetic sample."""

import hashlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import raises
from support.data import noise

from segnet_scratch import data
from segnet_scratch.errors import DataError, DTypeError, SegnetError, ShapeError

# --- transforms ----------------------------------------------------------------------------------


def denormalised(pixels: np.ndarray) -> np.ndarray:
    return (pixels * data.IMAGENET_STD + data.IMAGENET_MEAN) * 255


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red is the row and whose green is the column, and a mask computed from both."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    return image, place_label(rows, columns)


def place_label(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return ((rows * 7 + columns * 3) % 200).astype(np.uint8)


def test_normalise_is_the_published_formula():
    image = np.array([[[0, 128, 255], [255, 0, 1]]], np.uint8)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    result = data.normalise(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "kind"), [(1.0, "same"), (1.5, "crop"), (0.5, "padding")])
def test_image_and_mask_move_together(scale, kind):
    size = (64, 96)
    image, mask = coordinates(round(64 * scale), round(96 * scale))  # resizing is then the identity
    transform = data.TrainTransform(size, scale=(scale, scale))
    tops, lefts, flips = [], [], set()
    for index in range(40):
        pixels, labels = transform(image, mask, data.sample_rng(0, 0, index))
        assert (pixels.shape, pixels.dtype) == ((64, 96, 3), np.float32)
        assert (labels.shape, labels.dtype) == ((64, 96), np.uint8)
        inside = labels != data.VOID
        assert inside.sum() == min(image.shape[0], 64) * min(image.shape[1], 96)
        np.testing.assert_array_equal(pixels[~inside], 0)
        back = denormalised(pixels)[inside]
        np.testing.assert_allclose(back, np.round(back), atol=1e-3)
        rows, columns = (np.round(back[:, channel]).astype(int) for channel in (0, 1))
        np.testing.assert_array_equal(labels[inside], place_label(rows, columns))
        flips.add(bool(columns[0] > columns[1]))
        tops.append(rows.min() + inside.argmax() // 96)
        lefts.append(columns.min() + inside.argmax() % 96)
    assert flips == {True, False}
    if kind != "same":
        assert len(set(tops)) > 10
        assert len(set(lefts)) > 10
        assert np.abs(np.corrcoef(tops, lefts)[0, 1]) < 0.5


@pytest.mark.parametrize(("source", "target"), [(5, 4), (4, 5)])
def test_every_place_of_a_crop_is_reached(source, target):
    image, mask = coordinates(source, source)
    transform = data.TrainTransform((target, target), scale=(source / target, source / target), flip=False)
    results = {transform(image, mask, data.sample_rng(0, 0, index))[1].tobytes() for index in range(60)}
    assert len(results) == 4, "two tops times two lefts"


def test_image_and_mask_stay_aligned_when_scaled():
    rows, columns = np.mgrid[0:75, 0:100]
    image = np.stack([rows * 3, columns * 2, rows * 0], axis=2).astype(np.uint8)
    mask = (rows // 15 * 10 + columns // 10).astype(np.uint8)  # bands of 15 rows and 10 columns
    transform = data.TrainTransform((60, 80), scale=(0.5, 2.0))
    for index in range(40):
        pixels, labels = transform(image, mask, data.sample_rng(1, 0, index))
        inside = labels != data.VOID
        back = denormalised(pixels)[inside]
        label = labels[inside].astype(int)
        # The colour tells the source pixel to about one pixel; it must lie in the label's band.
        assert np.abs(back[:, 0] / 3 - (label // 10 * 15 + 7)).max() < 8.6
        assert np.abs(back[:, 1] / 2 - (label % 10 * 10 + 4.5)).max() < 6.1


def test_masks_are_never_interpolated():
    mask = np.random.default_rng(0).choice(np.array([0, 20, 255], np.uint8), (37, 53))
    image = noise(37, 53)
    for index in range(30):
        _, labels = data.TrainTransform((40, 40), scale=(0.3, 3.0))(image, mask, data.sample_rng(0, 0, index))
        assert set(np.unique(labels)) <= {0, 20, 255}
    for size in ((5, 7), (37, 53), (111, 90)):
        assert set(np.unique(data.resize_mask(mask, size))) <= {0, 20, 255}


def test_resizing_takes_height_first_and_antialiases():
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, ::2] = 200
    small = data.resize_image(stripes, (10, 20))
    assert small.shape == (10, 20, 3)
    assert np.abs(small.astype(int) - 100).max() <= 15, "aliased stripes would be 0 or 200"
    assert data.resize_mask(stripes[:, :, 0], (10, 20)).shape == (10, 20)


def test_eval_transform_is_plain_resizing():
    image, mask = noise(), np.random.default_rng(0).integers(0, 21, (20, 30)).astype(np.uint8)
    pixels, labels = data.EvalTransform((10, 12))(image, mask, data.sample_rng(0, 0, 0))
    np.testing.assert_array_equal(pixels, data.normalise(data.resize_image(image, (10, 12))))
    np.testing.assert_array_equal(labels, data.resize_mask(mask, (10, 12)))


def test_transforms_do_not_change_their_input():
    image, mask = coordinates(64, 96)
    copies = image.copy(), mask.copy()
    data.TrainTransform((32, 48))(image, mask, data.sample_rng(0, 0, 0))
    data.EvalTransform((64, 96))(image, mask, data.sample_rng(0, 0, 0))[1][:] = 0
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(mask, copies[1])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: data.TrainTransform((0, 5)), DataError),
        (lambda: data.TrainTransform((5, 5), scale=(2, 1)), DataError),
        (lambda: data.TrainTransform((5, 5), scale=(0, 1)), DataError),
        (lambda: data.TrainTransform((5, 5), scale=(float("nan"), 1)), DataError),
        (lambda: data.EvalTransform((5,)), DataError),  # type: ignore[arg-type]
        (lambda: data.normalise(np.zeros((4, 4, 3), np.float32)), DTypeError),
        (lambda: data.normalise(np.zeros((4, 4), np.uint8)), ShapeError),
        (lambda: data.resize_image(np.zeros((4, 4, 4), np.uint8), (2, 2)), ShapeError),
        (lambda: data.resize_mask(np.zeros((4, 4), np.int64), (2, 2)), DTypeError),
        (lambda: data.resize_mask(np.zeros((4, 4, 3), np.uint8), (2, 2)), ShapeError),
        (lambda: data.resize_mask(np.zeros((4, 4), np.uint8), (2, 0)), DataError),
        (
            lambda: data.EvalTransform((4, 4))(noise(4, 5), np.zeros((5, 4), np.uint8), data.sample_rng(0, 0, 0)),
            ShapeError,
        ),
    ],
)
def test_wrong_arguments_of_transforms_are_refused(call, error):
    with pytest.raises(error):
        call()


# --- loader --------------------------------------------------------------------------------------


class SlowPictures(data.VOCDataset):
    """Samples from memory that take unequal times, so that threads finish out of order; counts its calls."""

    def __init__(self, count: int, damaged: int | None = None) -> None:
        self.count = count
        self.damaged = damaged
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        self.asked.append(index)
        time.sleep(0.001 * (index * 7 % 4))
        if index == self.damaged:
            raise DataError(f"picture{index}.jpg: damaged")
        mask = np.full((12, 16), index % 256, np.uint8)
        return noise(12, 16, seed=index), mask, f"picture{index}"


def batches_of(loader: data.Loader, epoch: int, start_batch: int = 0) -> list[tuple]:
    return [(batch.ids, batch.images.tobytes(), batch.labels.tobytes()) for batch in loader.epoch(epoch, start_batch)]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("segnet-data")]


def test_batches_hold_the_transformed_samples():
    source = SlowPictures(11)
    transform = data.TrainTransform((10, 10))
    loader = data.Loader(source, transform, batch=4, seed=5)
    assert loader.batches_per_epoch == 3
    batches = list(loader.epoch(2))
    assert [batch.images.shape for batch in batches] == [(4, 10, 10, 3), (4, 10, 10, 3), (3, 10, 10, 3)]
    assert [batch.labels.shape for batch in batches] == [(4, 10, 10), (4, 10, 10), (3, 10, 10)]
    assert batches[0].images.dtype == np.float32
    assert batches[0].images.flags.c_contiguous
    order = data.epoch_order(11, 5, 2).tolist()
    assert [name for batch in batches for name in batch.ids] == [f"picture{index}" for index in order]
    position = 0
    for batch in batches:
        for pixels, labels in zip(batch.images, batch.labels, strict=True):
            index = order[position]
            image, mask, _ = source.sample(index)
            expected = transform(image, mask, data.sample_rng(5, 2, index))
            np.testing.assert_array_equal(pixels, expected[0])
            np.testing.assert_array_equal(labels, expected[1])
            position += 1


def test_workers_and_prefetch_do_not_change_the_stream():
    reference = batches_of(data.Loader(SlowPictures(23), data.TrainTransform((10, 10)), 4, seed=1, workers=0), 3)
    for workers, prefetch in ((1, 1), (2, 2), (7, 1), (3, 9)):
        loader = data.Loader(SlowPictures(23), data.TrainTransform((10, 10)), 4, seed=1, workers=workers)
        loader.prefetch = prefetch
        assert batches_of(loader, 3) == reference


def test_seed_and_epoch_change_order_and_crops():
    loader = data.Loader(SlowPictures(12), data.TrainTransform((10, 10)), 4, seed=1)
    other = data.Loader(SlowPictures(12), data.TrainTransform((10, 10)), 4, seed=2)
    assert batches_of(loader, 0) == batches_of(loader, 0)
    assert batches_of(loader, 0) != batches_of(loader, 1)
    assert batches_of(loader, 0) != batches_of(other, 0)


def test_streams_of_samples_differ_in_every_number():
    first = {
        (seed, epoch, index): data.sample_rng(seed, epoch, index).random()
        for seed in range(4)
        for epoch in range(4)
        for index in range(4)
    }
    assert len(set(first.values())) == 64
    assert data.sample_rng(1, 2, 3).random() == first[1, 2, 3]


def test_order_is_a_permutation_of_its_own_in_each_epoch():
    order = data.epoch_order(50, 0, 0)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))
    assert order.tolist() != data.epoch_order(50, 0, 1).tolist()


@pytest.mark.parametrize("drop_last", [False, True])
def test_resuming_gives_the_tail_without_decoding_the_head(drop_last):
    def new_loader() -> data.Loader:
        return data.Loader(SlowPictures(14), data.TrainTransform((10, 10)), 4, seed=3, drop_last=drop_last)

    whole = batches_of(new_loader(), 1)
    assert len(whole) == new_loader().batches_per_epoch == (3 if drop_last else 4)
    for start in range(len(whole) + 1):
        loader = new_loader()
        assert batches_of(loader, 1, start) == whole[start:]
        tail = data.epoch_order(14, 3, 1)[start * 4 : 12 if drop_last else 14]
        assert sorted(loader.dataset.asked) == sorted(tail.tolist())


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_damaged_sample_is_reported_when_its_batch_is_due(workers):
    order = data.epoch_order(16, 0, 0).tolist()
    loader = data.Loader(SlowPictures(16, damaged=order[9]), data.EvalTransform((8, 8)), 4, workers=workers)
    stream = loader.epoch(0)
    assert [next(stream).ids[0], next(stream).ids[0]] == [f"picture{order[0]}", f"picture{order[4]}"]
    with pytest.raises(DataError, match=rf"picture{order[9]}\.jpg"):
        next(stream)
    assert not loader_threads()


def test_a_damaged_file_reaches_the_consumer(voc):
    (voc / "JPEGImages/f.jpg").write_bytes(b"")
    with raises(DataError, str(voc / "JPEGImages/f.jpg")):
        list(data.Loader(data.VOCDataset(voc, "train"), data.TrainTransform((10, 10)), 3).epoch(0))


def test_closing_early_stops_the_threads():
    loader = data.Loader(SlowPictures(1000), data.EvalTransform((8, 8)), 4, workers=3)
    loader.prefetch = 200
    stream = loader.epoch(0)
    next(stream)
    assert loader_threads()
    stream.close()
    assert not loader_threads()
    assert len(loader.dataset.asked) < 600, "what was queued and not begun is dropped"


def test_batches_are_prepared_ahead():
    loader = data.Loader(SlowPictures(40), data.EvalTransform((8, 8)), 4, workers=2)
    loader.prefetch = 3
    stream = loader.epoch(0)
    next(stream)
    deadline = time.perf_counter() + 60
    while len(loader.dataset.asked) < 4 + 3 * 4 and time.perf_counter() < deadline:
        time.sleep(0.005)
    assert len(loader.dataset.asked) == 4 + 3 * 4
    stream.close()


def test_waiting_is_measured(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("segnet_scratch.data.loader.perf_counter", lambda: clock[0])

    class Slow(SlowPictures):
        def sample(self, index):
            clock[0] += 2
            return super().sample(index)

    loader = data.Loader(Slow(8), data.EvalTransform((8, 8)), 2, workers=0)
    assert loader.waited == 0
    for _ in loader.epoch(0):
        clock[0] += 100  # what the consumer does is no waiting
    assert loader.waited == 8 * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_map_keeps_order(workers):
    assert list(data.ordered_map(lambda n: n * n, range(20), workers, ahead=3)) == [n * n for n in range(20)]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"batch": 0}, "batch 0"),
        ({"batch": 2, "seed": -1}, "seed -1"),
        ({"batch": 2, "workers": -1}, "workers -1"),
        ({"batch": 9, "drop_last": True}, "8 samples"),
    ],
)
def test_wrong_arguments_of_the_loader_are_refused(options, hint):
    with pytest.raises(DataError, match=hint):
        data.Loader(SlowPictures(8), data.EvalTransform((8, 8)), **options)


def test_an_empty_set_and_epochs_that_do_not_exist_are_refused():
    with pytest.raises(DataError, match="no samples"):
        data.Loader(SlowPictures(0), data.EvalTransform((8, 8)), 2)
    loader = data.Loader(SlowPictures(8), data.EvalTransform((8, 8)), 2)
    for epoch, start_batch in ((-1, 0), (0, -1), (0, 5)):
        with pytest.raises(DataError, match=str(min(epoch, start_batch) if start_batch != 5 else 5)):
            loader.epoch(epoch, start_batch)


# --- synthetic sample ----------------------------------------------------------------------------


def digest(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_sample_is_deterministic_and_readable(tmp_path):
    first = data.write_sample(tmp_path / "one", train=6, val=3)
    second = data.write_sample(tmp_path / "two", train=6, val=3)
    other = data.write_sample(tmp_path / "other", train=6, val=3, seed=1)
    assert digest(first) == digest(second)
    pictures = [name for name in digest(first) if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 18
    assert len({digest(root)[name] for root in (first, other) for name in pictures}) == 36
    for split, count in (("train", 6), ("val", 3), ("trainval", 9)):
        dataset = data.VOCDataset(first, split)
        assert len(dataset) == count
        assert dataset.names == data.SAMPLE_CLASSES
        for index in range(count):
            image, mask, _ = dataset.sample(index)
            assert image.shape == (96, 128, 3)
            assert data.VOID in mask
    assert not set(data.VOCDataset(first, "train").ids) & set(data.VOCDataset(first, "val").ids)


def test_every_class_occurs_in_most_images():
    masks = [data.draw_sample((96, 128), data.sample_rng(0, 0, index))[1] for index in range(40)]
    for label in range(len(data.SAMPLE_CLASSES)):
        assert np.mean([(mask == label).sum() >= 20 for mask in masks]) > 0.7, data.SAMPLE_CLASSES[label]


def test_void_runs_between_all_regions():
    _, mask = data.draw_sample((96, 128), data.sample_rng(0, 0, 0))
    for first, second in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        border = (first != second) & (first != data.VOID) & (second != data.VOID)
        assert not border.any()
    assert 0.02 < (mask == data.VOID).mean() < 0.2


def test_running_again_is_harmless(tmp_path):
    root = data.write_sample(tmp_path / "s", train=3, val=2)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    data.write_sample(tmp_path / "s", train=3, val=2)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_foreign_folder_is_left_alone(voc, tmp_path):
    before = digest(voc)
    with pytest.raises(DataError, match="set: holds something else"):
        data.write_sample(voc, train=3, val=2)
    assert digest(voc) == before
    root = data.write_sample(tmp_path / "s", train=3, val=2)
    with pytest.raises(DataError, match=r"another sample"):
        data.write_sample(root, train=3, val=2, seed=9)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file"):
        data.write_sample(tmp_path / "file")


def test_an_interrupted_write_is_no_data_set_and_can_be_completed(tmp_path, monkeypatch):
    whole = data.write_sample(tmp_path / "whole", train=4, val=2)
    written = []

    def interrupted(path: Path, labels: np.ndarray) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        data.save_indexed_png(path, labels)

    monkeypatch.setattr("segnet_scratch.data.sample.save_indexed_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.write_sample(tmp_path / "cut", train=4, val=2)
    with pytest.raises(DataError, match="no split 'train'"):
        data.VOCDataset(tmp_path / "cut", "train")
    monkeypatch.undo()
    assert digest(data.write_sample(tmp_path / "cut", train=4, val=2)) == digest(whole)


@pytest.mark.parametrize("options", [{"train": 0}, {"val": 0}, {"seed": -1}, {"size": (20, 128)}, {"size": (96, 9999)}])
def test_wrong_settings_of_the_sample_are_refused(tmp_path, options):
    with pytest.raises(SegnetError, match="expected"):
        data.write_sample(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
