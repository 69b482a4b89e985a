"""The loss of the fused engine, beyond what the templates over the op table check: padding, edges, and the
steps in which a block takes its pixels. Faults put into it: test_mutants.py.
"""

import numpy as np
import pytest

from segnet_scratch.ops.loss.cross_entropy import CrossEntropyBackward, CrossEntropyForward
from segnet_scratch.ops.loss.softmax_cross_entropy import SoftmaxCrossEntropy
from segnet_scratch.ops.op import VOID, spec, spec_of
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.runtime.precision import BFLOAT16

F32 = np.dtype(np.float32)
each_device = pytest.mark.parametrize("device", ["numpy", "host"])
each_storage = pytest.mark.parametrize("storage", [F32, BFLOAT16], ids=str)


def problem(seed, classes, shape=(2, 5, 7), storage=F32, weighted=True, void=0.2):
    """(logits, labels, weights); the padding holds numbers larger than all logits."""
    rng = np.random.default_rng(seed)
    logits = np.full((*shape, -(-classes // 8) * 8), 1e3, np.float32)
    logits[..., :classes] = 3 * rng.standard_normal((*shape, classes))
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < void] = VOID
    weights = rng.uniform(0.1, 3, classes).astype(np.float32) if weighted else None
    return logits.astype(storage), labels, weights


def run(device, logits, labels, weights, classes, *options):
    """(loss, dlogits) as arrays of the CPU."""
    device = get_device(device)
    given = {"logits": logits, "labels": labels, "class_weights": weights, "share": None}
    arrays = {name: None if array is None else device.upload(array) for name, array in given.items()}
    out = SoftmaxCrossEntropy.plan(spec_of(logits), classes, *options)(device, **arrays)
    return float(device.download(out.loss)[0]), device.download(out.dlogits)


def tolerances(storage):
    """Of gradients, which are stored."""
    return {"rtol": 2**-8, "atol": 1e-7} if storage == BFLOAT16 else {"rtol": 1e-5, "atol": 1e-7}


@each_device
@each_storage
def test_padding_is_not_looked_at_and_has_no_gradient(device, storage):
    logits, labels, weights = problem(3, 21, storage=storage)
    loss, gradient = run(device, logits, labels, weights, 21)
    assert np.isfinite(loss)
    for number in (np.nan, np.inf, -np.inf, 0.0):
        logits[..., 21:] = number
        again, same = run(device, logits, labels, weights, 21)
        assert (again, same.tobytes()) == (loss, gradient.tobytes())
    padding = gradient[..., 21:]
    assert padding.tobytes() == bytes(padding.nbytes)  # + 0, every bit
    assert (gradient[..., :21] != 0).any()


@each_device
@each_storage
def test_nothing_to_average(device, storage):
    logits, labels, weights = problem(4, 5, storage=storage)
    for case in ({"labels": np.full_like(labels, VOID)}, {"weights": np.zeros_like(weights)}):
        arrays = {"labels": labels, "weights": weights} | case
        loss, gradient = run(device, logits, arrays["labels"], arrays["weights"], 5, "weights", 0.1)
        assert loss == 0
        assert (gradient == 0).all()


@each_device
@each_storage
def test_a_void_pixel_may_hold_anything(device, storage):
    logits, labels, weights = problem(5, 21, storage=storage)
    loss, gradient = run(device, logits, labels, weights, 21, "valid", 0.1)
    logits[labels == VOID] = np.nan
    again, same = run(device, logits, labels, weights, 21, "valid", 0.1)
    assert (again, same.tobytes()) == (loss, gradient.tobytes())
    assert np.isfinite(loss)
    assert (gradient[labels == VOID] == 0).all()


@each_storage
def test_steps_of_a_block(storage):
    """Shared memory holds 27 pixels of 256 float32 channels, 54 of bfloat16; up to 28 channels each thread has one."""
    at_once = 1792 // (256 // (16 // storage.itemsize) + 1)
    sizes = [(255, pixels) for pixels in (1, at_once - 1, at_once, at_once + 1, 3 * at_once + 1)]
    for classes, pixels in (*sizes, (24, 255), (24, 257), (25, 257), (1, 513)):
        logits, labels, weights = problem(pixels, classes, (1, 1, pixels), storage)
        loss, gradient = run("host", logits, labels, weights, classes, "weights", 0.1)
        expected, wanted = of_the_layers(logits[..., :classes], labels, weights, 0.1)
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7), (classes, pixels)
        np.testing.assert_allclose(gradient[..., :classes].astype(np.float32), wanted, **tolerances(storage))


def of_the_layers(logits, labels, weights, smoothing):
    """(loss, dlogits) of the layers engine on NumPy."""
    flat, device = np.ascontiguousarray(logits.reshape(-1, logits.shape[-1]), np.float32), get_device("numpy")
    given = {"logits": flat, "labels": labels.reshape(-1), "class_weights": weights}
    options = spec(flat.shape, F32), "weights", smoothing
    forward = CrossEntropyForward.plan(*options)(device, **given)
    backward = CrossEntropyBackward.plan(*options)(device, **given, sums=forward.sums, dloss=np.ones(1, np.float32))
    return float(forward.loss[0]), backward.dlogits.reshape(logits.shape)
