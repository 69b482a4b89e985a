"""The inference step that everything shares: both engines, shapes, samples, and a GPU's graphs against the stand-in."""

import threading
from itertools import count, islice

import numpy as np
import pytest
from support.evaluation import network, segment

from segnet_scratch import inference_step
from segnet_scratch.boundary import Boundary
from segnet_scratch.data import VOCDataset, in_background, ordered_map
from segnet_scratch.errors import ConfigError, DataError, DTypeError, ShapeError
from segnet_scratch.evaluate import evaluate
from segnet_scratch.inference import Inference, Segmenter
from segnet_scratch.inference_step import InferenceStep
from segnet_scratch.runtime.devices import CudaDevice
from segnet_scratch.segnet import SegNetBasic
from segnet_scratch.step import resolve

SIZE, LARGER = (17, 24), (32, 40)
ENGINES = [("layers", "float32"), ("fused", "float32"), ("fused", "bf16")]


def narrow(device="numpy", **options):
    return SegNetBasic(6, 0.125, device, seed=1, **options).eval()


def batch(seed, n=2, size=SIZE):
    return np.random.default_rng(seed).standard_normal((n, *size, 3)).astype(np.float32)


def pictures(n, height=33, width=61):
    return np.random.default_rng(3).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def assert_close(found, expected, precision):
    """In bfloat16 another pixel may be the largest of a pool, and a fresh net is not steady: 0.1 to 0.26."""
    limit = 0.35 if precision == "bf16" else 2e-5
    assert np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)


@pytest.mark.parametrize("device", ["numpy", "host"])
@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_engines_agree_for_batches_of_any_shape(device, engine, precision):
    step, reference = InferenceStep(narrow(device), engine, precision), InferenceStep(narrow())
    for seed, shape in enumerate([(2, 17, 24), (1, 17, 24), (2, 17, 24), (1, 20, 18)]):
        images = batch(seed, shape[0], shape[1:])
        expected = reference(images).copy()
        found = step.device.download(step(images)).astype(np.float32)
        assert found.shape == (*shape, step.channels)
        assert_close(found[..., :6], expected, precision)
        assert (found[..., 6:] < -1e29).all()


def test_shapes_are_forgotten_least_recently_used_first(monkeypatch):
    monkeypatch.setattr(inference_step, "SHAPES", 2)
    step = InferenceStep(narrow(), "fused")
    for n in (1, 2, 1, 3):
        step(batch(n, n))
    assert [shape[0] for shape, _ in step._passes] == [1, 3]


def test_what_is_no_batch_is_refused():
    step = InferenceStep(narrow())
    with pytest.raises(ShapeError, match=r"images \(17, 24, 3\); expected \(n, h, w, 3\)"):
        step(batch(0)[0])
    with pytest.raises(DTypeError, match="images of uint8; expected float32"):
        step(np.zeros((1, *SIZE, 3), np.uint8))
    with pytest.raises(ConfigError, match="decoder of this network is 'bilinear'"):
        InferenceStep(narrow(decoder="bilinear"), "fused")


def test_what_auto_means(cupy):
    gpu, cpu = narrow(CudaDevice()), narrow()
    assert resolve(gpu, "auto", "auto", training=False) == ("fused", "bf16")
    assert resolve(gpu.fold_batch_norm(), "auto", "float32", training=False) == ("fused", "float32")
    assert resolve(cpu, "auto", "auto", training=False) == ("layers", "float32")
    assert resolve(cpu, "fused", "auto", training=False) == ("fused", "float32")
    # Samples need dropout, which is the layers' alone.
    bayesian = network(dropout=True, device=CudaDevice())
    assert Segmenter(bayesian, (32, 32), Inference(samples=2)).step.engine == "layers"
    with pytest.raises(ConfigError, match="layers compute in float32 or tf32"):
        resolve(cpu, "layers", "bf16", training=False)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_segmentation_by_the_fused_engine_is_that_of_the_layers(precision):
    model, (image,) = narrow(), pictures(1)
    for inference in (Inference(), Inference((1.0, 1.25), flip=True), Inference(window=(32, 40))):
        expected = segment(model, image, LARGER, inference, with_logits=True)
        found = Segmenter(model, LARGER, inference, "fused", precision)(image, with_logits=True)
        assert_close(found.logits, expected.logits, precision)
        np.testing.assert_array_equal(found.labels, found.logits.argmax(axis=2))


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_on_a_gpu_a_shape_is_one_graph_and_nothing_waits_between_batches(cupy, engine, precision):
    images = pictures(7)
    plain = [segment(narrow(), image, LARGER).labels for image in images]
    segmenter = Segmenter(narrow(CudaDevice()), LARGER, None, engine, precision, batch=2)
    shown, read = [], []
    results = segmenter.stream(range(7), lambda k: (k, images[k]), watch=lambda whats, logits: shown.append(whats))
    for k, image, found in results:
        read.append(len(shown))
        assert image.base is images
        assert (found.labels == plain[k]).mean() > (0.75 if precision == "bf16" else 0.998)
    assert shown == [[0, 1], [2, 3], [4, 5], [6]]
    assert read == [2, 2, 3, 3, 4, 4, 4]  # the next batch has been given before one is read
    replays = [replayed._replay is not None for _, replayed in segmenter.step._passes.values()]
    assert replays == [True, False]  # batches of two; the last image came alone
    assert segmenter.seconds > 0


@pytest.mark.parametrize("way", [Inference(flip=True), Inference(window=(32, 40)), Inference(samples=2)])
def test_averages_on_a_gpu_are_those_of_the_cpu(cupy, way):
    (image,) = pictures(1)
    models = [network(dropout=True, device=device) for device in ("numpy", CudaDevice())]
    expected = segment(models[0], image, LARGER, way, with_logits=True).logits
    segmenter = Segmenter(models[1], LARGER, way, "layers")
    for _ in range(2):  # the second time from graphs
        np.testing.assert_allclose(segmenter(image, with_logits=True).logits, expected, atol=2e-3)


def test_evaluation_on_a_gpu_scores_as_on_the_cpu(cupy, sample):
    dataset = VOCDataset(sample, "val")
    expected = evaluate(Segmenter(narrow(), LARGER, batch=2), dataset, Boundary.csurka)
    for engine, precision in ENGINES:
        segmenter = Segmenter(narrow(CudaDevice()), LARGER, None, engine, precision, batch=2)
        found = evaluate(segmenter, dataset, Boundary.csurka)
        limit = 0.2 if precision == "bf16" else 2e-3
        assert found.loss == pytest.approx(expected.loss, rel=limit)
        assert found.scores.global_accuracy == pytest.approx(expected.scores.global_accuracy, abs=limit)
        assert [image.id for image in found.per_image] == list(dataset.ids)


def test_windows_tell_how_far_they_are():
    segmenter, told = Segmenter(network(), (32, 32), Inference((1.0, 1.5), window=(32, 32))), []
    segmenter.watch = lambda done, windows: told.append((done, windows))
    segmenter(pictures(1, 60, 80)[0])
    done, totals = zip(*told, strict=True)
    assert [sorted(done), set(totals)] == [list(done), {done[-1]}]


# What reads and writes beside the network


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_source_comes_after_what_was_before_it(workers):
    def items():
        yield from range(3)
        raise DataError("breaks off")

    results = ordered_map(lambda k: 10 * k, items(), workers, ahead=8)
    assert list(islice(results, 3)) == [0, 10, 20]
    with pytest.raises(DataError, match="breaks off"):
        next(results)


def test_what_is_ahead_weighs_so_much_at_most():
    given = []
    items = (given.append(weight) or weight for weight in [3, 3, 9, 1, 1])
    results = ordered_map(lambda weight: weight, items, 2, 9, weigh=int, most=6)
    assert [next(results) and sum(given) for _ in range(4)] == [15, 15, 16, 17]


def test_an_iterator_is_drawn_from_by_a_thread_of_its_own():
    threads = set()

    def items():
        for k in count():
            threads.add(threading.current_thread())
            yield k

    taken = in_background(items(), ahead=2)
    assert list(islice(taken, 5)) == [0, 1, 2, 3, 4]
    taken.close()
    assert threading.current_thread() not in threads
