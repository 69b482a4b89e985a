"""Averaged predictions: mirror images, scales, windows and dropout samples, against plain NumPy."""

import tracemalloc

import numpy as np
import pytest
from support.evaluation import bilinear, network, segment, softmax

from segnet_scratch import get_device
from segnet_scratch import inference as inference_module
from segnet_scratch.data import normalise, resize_image
from segnet_scratch.errors import ConfigError, ShapeError
from segnet_scratch.inference import Inference, Segmenter, window_starts
from segnet_scratch.ops.op import spec_of
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearForward, Rows, source_rows

SIZE = (40, 48)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def bayesian():
    return network(dropout=True)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def logits_of(model, image):
    """Logits (h, w, classes) of an image at its own size."""
    return model(normalise(np.ascontiguousarray(image))[None]).numpy()[0]


def probabilities(model, image, inference):
    """What `segment` averaged: the softmax of its logits."""
    return softmax(segment(model, image, SIZE, inference, with_logits=True).logits)


def test_one_view_is_the_network(model):
    image = picture(33, 61)
    expected = bilinear(logits_of(model, resize_image(image, SIZE)), 33, 61)
    found = segment(model, image, SIZE, with_logits=True)
    np.testing.assert_allclose(found.logits, expected, atol=1e-4)
    np.testing.assert_array_equal(found.labels, found.logits.argmax(axis=2))
    assert (found.labels.dtype, found.logits.dtype, found.uncertainty) == (np.uint8, np.float32, None)
    assert segment(model, image, SIZE).logits is None


def test_flip_and_scales_average_softmax(model):
    image = picture(33, 61)
    views = []
    for height, width in ((32, 38), SIZE, (60, 72)):
        for step in (1, -1):
            logits = logits_of(model, resize_image(image[:, ::step], (height, width)))
            views.append(softmax(bilinear(logits, 33, 61)[:, ::step]))
    inference = Inference((0.8, 1.0, 1.5), flip=True)
    np.testing.assert_allclose(probabilities(model, image, inference), np.mean(views, axis=0), atol=1e-5)
    np.testing.assert_array_equal(segment(model, image, SIZE, inference).labels, np.mean(views, axis=0).argmax(axis=2))


def test_a_mirrored_image_gives_the_mirrored_result(model):
    image = picture(40, 48)
    inference = Inference(flip=True)
    found = probabilities(model, image[:, ::-1], inference)
    np.testing.assert_allclose(found[:, ::-1], probabilities(model, image, inference), atol=1e-5)
    plain = softmax(segment(model, image, SIZE, with_logits=True).logits)
    assert np.abs(plain - probabilities(model, image, inference)).max() > 0.01


# Windows


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (100, 40, 20, [0, 20, 40, 60]),
        (101, 40, 20, [0, 20, 40, 60, 61]),
        (99, 40, 40, [0, 40, 59]),
        (80, 40, 40, [0, 40]),
        (41, 40, 40, [0, 1]),
        (40, 40, 7, [0]),
        (39, 40, 7, [0]),
        (1, 40, 7, [0]),
    ],
)
def test_where_windows_begin(length, window, stride, expected):
    assert window_starts(length, window, stride) == expected


@pytest.mark.parametrize("stride", [None, (33, 40), (20, 13)])
@pytest.mark.parametrize("size", [(70, 90), (33, 91), (50, 40)], ids=["both", "columns", "rows"])
def test_overlapping_windows_are_averaged(model, size, stride):
    image, (height, width) = picture(*size), size
    step = stride or (24, 30)
    total, seen = np.zeros((height, width, 6)), np.zeros((height, width, 1))
    for top in sorted({*range(0, height - 33, step[0]), height - 33}):
        for left in sorted({*range(0, width - 40, step[1]), width - 40}):
            total[top : top + 33, left : left + 40] += logits_of(model, image[top : top + 33, left : left + 40])
            seen[top : top + 33, left : left + 40] += 1
    assert seen.min() >= 1
    found = probabilities(model, image, Inference(window=(33, 40), stride=stride))
    np.testing.assert_allclose(found, softmax(total / seen), atol=1e-5)


def test_a_window_as_large_as_the_image_is_one_pass_at_its_own_size(model):
    image = picture(50, 64)
    found = probabilities(model, image, Inference(window=(50, 64)))
    np.testing.assert_allclose(found, softmax(logits_of(model, image)), atol=1e-6)


def test_an_image_smaller_than_a_window_is_padded_with_the_mean_colour(model):
    image = picture(20, 70)
    padded = np.zeros((32, 70, 3), np.float32)
    padded[:20] = normalise(image)
    expected = np.zeros((32, 70, 6))
    seen = np.zeros((1, 70, 1))
    for left in (0, 24, 38):
        expected[:, left : left + 32] += model(np.ascontiguousarray(padded[None, :, left : left + 32])).numpy()[0]
        seen[:, left : left + 32] += 1
    found = probabilities(model, image, Inference(window=(32, 32)))
    assert found.shape == (20, 70, 6)
    np.testing.assert_allclose(found, softmax(expected / seen)[:20], atol=1e-5)


def test_windows_of_a_scaled_image_come_back_at_its_size(model):
    image = picture(48, 64)
    larger = resize_image(image, (72, 96))
    expected = softmax(bilinear(logits_of(model, larger), 48, 64))
    found = probabilities(model, image, Inference((1.5,), window=(72, 96)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Samples


def drawn(model, image, samples):
    """The softmax of every sample, at the image's size."""
    result = []
    for sample in range(samples):
        model.set_random_state(0, sample)
        for dropout in model.dropouts.values():
            dropout.training = True
        result.append(softmax(bilinear(logits_of(model, resize_image(image, SIZE)), *image.shape[:2])))
        model.eval()
    return np.array(result)


@pytest.mark.parametrize("samples", [2, 5])
def test_samples_give_mean_and_variance(bayesian, samples):
    image = picture(33, 61)
    expected = drawn(bayesian, image, samples)
    found = segment(bayesian, image, SIZE, Inference(samples=samples), with_logits=True)
    np.testing.assert_allclose(softmax(found.logits), expected.mean(axis=0), atol=1e-5)
    np.testing.assert_array_equal(found.labels, found.logits.argmax(axis=2))
    assert found.uncertainty.dtype == np.float32
    np.testing.assert_allclose(found.uncertainty, expected.var(axis=0).mean(axis=2), atol=1e-6)
    assert found.uncertainty.max() > 0.01
    # The samples differ, also from the network without dropout.
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    assert np.abs(softmax(found.logits) - softmax(segment(bayesian, image, SIZE, None, True).logits)).max() > 0.01


def test_averages_on_the_device_are_those_of_the_cpu(bayesian, monkeypatch):
    image, inference = picture(33, 61), Inference((0.8, 1.2), flip=True, samples=2)
    expected = Segmenter(bayesian, SIZE, inference)(image, with_logits=True)
    on_device = Segmenter(bayesian, SIZE, inference)
    on_device._on_gpu = True
    monkeypatch.delattr(inference_module, "softmax")  # which the CPU's way needs
    found = on_device(image, with_logits=True)
    np.testing.assert_allclose(np.exp(found.logits), np.exp(expected.logits), rtol=1e-5)
    np.testing.assert_allclose(found.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-9)


def test_samples_are_the_same_for_every_image_and_every_time(bayesian):
    images = [picture(33, 61, seed) for seed in range(2)]
    inference = Inference(samples=3, flip=True)
    first = [segment(bayesian, image, SIZE, inference, True) for image in images]
    second = [segment(bayesian, image, SIZE, inference, True) for image in images[::-1]][::-1]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        np.testing.assert_array_equal(one.uncertainty, other.uncertainty)


def test_the_variance_is_that_of_the_mean_over_views(bayesian):
    """With mirror images too, a sample is the mean of both."""
    image = picture(33, 61)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    both = (drawn(bayesian, image, 3) + drawn(bayesian, mirrored, 3)[:, :, ::-1]) / 2
    found = segment(bayesian, image, SIZE, Inference(samples=3, flip=True))
    np.testing.assert_allclose(found.uncertainty, both.var(axis=0).mean(axis=2), atol=1e-6)


def test_dropout_is_off_again_afterwards_also_after_an_error(bayesian):
    image = picture(40, 48)
    before = segment(bayesian, image, SIZE, with_logits=True).logits
    segment(bayesian, image, SIZE, Inference(samples=2))
    np.testing.assert_array_equal(segment(bayesian, image, SIZE, with_logits=True).logits, before)

    def broken(*arguments):
        raise KeyboardInterrupt

    bayesian.forward = broken
    with pytest.raises(KeyboardInterrupt):
        segment(bayesian, image, SIZE, Inference(samples=2))
    del bayesian.forward
    np.testing.assert_array_equal(segment(bayesian, image, SIZE, with_logits=True).logits, before)


def test_devices_agree():
    image, inference = picture(40, 50), Inference((0.8, 1.2), flip=True, window=(32, 32), samples=2)
    results = [segment(network(device=name, dropout=True), image, SIZE, inference, True) for name in ("numpy", "host")]
    np.testing.assert_allclose(results[0].logits, results[1].logits, atol=2e-3)
    np.testing.assert_allclose(results[0].uncertainty, results[1].uncertainty, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (0.0,)}, "above 0"),
        ({"scales": (float("nan"),)}, "above 0"),
        ({"scales": (9.0,)}, "up to 8"),
        ({"scales": (1.0, 1.0)}, "twice"),
        ({"window": (31, 64)}, "window 31x64: expected at least 32"),
        ({"window": (64, 64), "stride": (65, 64)}, "stride 65x64: expected 1 pixel up to the window's 64x64"),
        ({"window": (64, 64), "stride": (0, 64)}, "stride 0x64"),
        ({"stride": (8, 8)}, "without a window"),
        ({"samples": 1}, "samples 1: expected at least 2"),
        ({"samples": -1}, "samples -1"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Inference(**options)


def test_what_does_not_fit_the_network_is_refused(model):
    image = picture(40, 48)
    with pytest.raises(ConfigError, match=r"no dropout.*dropout=true"):
        segment(model, image, SIZE, Inference(samples=4))
    with pytest.raises(ConfigError, match=r"scale 0\.5 of the input size 40x48 is 20x24; expected at least 32"):
        segment(model, image, SIZE, Inference((0.5, 1.0)))
    segment(model, image, SIZE, Inference((0.5,), window=(32, 32)))  # there the windows are what must be large enough


# Bounded memory


@pytest.mark.parametrize("device", ["numpy", "host"])
def test_rows_of_a_resized_map_are_those_of_the_whole_bit_for_bit(device):
    device = get_device(device)
    rng = np.random.default_rng(0)
    for (height, width), (oh, ow) in [((7, 5), (23, 11)), ((23, 6), (7, 6)), ((9, 9), (9, 4)), ((1, 3), (6, 3))]:
        x = rng.standard_normal((2, height, width, 3)).astype(np.float32)
        whole = device.download(ResizeBilinearForward.plan(spec_of(x), (oh, ow))(device, x=device.upload(x)).y)
        for first, count in [(0, oh), (0, 1), (oh - 1, 1), (oh // 3, oh // 2)]:
            low, high = source_rows(first, count, oh, height)
            part = np.ascontiguousarray(x[:, low:high])
            op = ResizeBilinearForward.plan(spec_of(part), (oh, ow), Rows(first, count, low, height))
            np.testing.assert_array_equal(
                device.download(op(device, x=device.upload(part)).y), whole[:, first : first + count]
            )


@pytest.mark.parametrize(
    "rows", [Rows(0, 9, 0, 4), Rows(-1, 2, 0, 4), Rows(6, 3, 0, 4), Rows(0, 8, 1, 9), Rows(7, 1, 0, 9)]
)
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(ShapeError, match="resize_bilinear: "):
        ResizeBilinearForward(spec_of(np.zeros((1, 4, 5, 3), np.float32)), (8, 5), rows)


WAYS = {
    "one view": Inference(),
    "flip and scales": Inference(scales=(0.8, 1.0), flip=True),
    "windows": Inference(window=(32, 48), stride=(20, 30)),
    "windows at scales, mirrored": Inference(scales=(0.7, 1.0, 1.3), window=(32, 40), flip=True),
    "windows larger than the image": Inference(window=(128, 160)),
    "samples": Inference(samples=3, window=(40, 48), flip=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_rows_give_the_bits_of_the_whole(monkeypatch, way):
    model, image = network(dropout=True), picture(93, 121)
    whole = segment(model, image, SIZE, WAYS[way], with_logits=True)
    monkeypatch.setattr(inference_module, "_BLOCK", 6 * 121 * 7)
    parts = segment(model, image, SIZE, WAYS[way], with_logits=True)
    for field in ("labels", "logits", "uncertainty"):
        np.testing.assert_array_equal(getattr(parts, field), getattr(whole, field))


@pytest.mark.parametrize("way", ["one view", "flip and scales", "windows"])
def test_memory_does_not_grow_with_classes_times_the_image(monkeypatch, way):
    model, image = network(), np.zeros((700, 1000, 3), np.uint8)
    monkeypatch.setattr(inference_module, "_BLOCK", 1 << 18)
    monkeypatch.setattr(inference_module, "_WINDOW_PIXELS", 1)  # one window at a time
    inference = WAYS[way] if way != "windows" else Inference(window=(96, 256), stride=(96, 256))
    segment(model, image[:200], SIZE, inference)
    tracemalloc.start()
    segment(model, image, SIZE, inference)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 13e6  # one map of logits in the size of the image has 17 MB
