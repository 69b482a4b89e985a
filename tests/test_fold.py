"""Batch norm folded into the convolutions: the same logits to rounding, on every device, and nothing that trains."""

from math import sqrt

import numpy as np
import pytest

from segnet_scratch import SegNet, SegNetBasic, load, tensor, weights
from segnet_scratch.errors import CheckpointError, TrainingError
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.nn.functions import conv2d, max_pool, max_unpool
from segnet_scratch.nn.modules import BatchNorm2d, ConvUnit
from segnet_scratch.optim import SGD

NETWORKS = [(SegNet, "indices"), (SegNet, "bilinear"), (SegNet, "deconv"), (SegNetBasic, "indices")]
F32, F64 = np.float32, np.float64


def network(cls=SegNet, device="numpy", dtype=F32, seed=0, **options):
    """A narrow network with parameters and statistics as of one that has been trained."""
    model = cls(5, 1 / 16, device, dtype=dtype, seed=seed, **options).eval()
    rng = np.random.default_rng(seed)
    for bn in model.named_modules(BatchNorm2d).values():
        shape = bn.weight.shape
        for tensor_, values in ((bn.weight, rng.uniform(0.5, 1.5, shape)), (bn.bias, rng.standard_normal(shape) / 4)):
            model.device.write(tensor_.data, values)
        model.device.write(bn.running_mean.data, rng.standard_normal(shape) / 4)
        model.device.write(bn.running_var.data, rng.uniform(0.5, 2, shape))
    return model


def images(n=2, height=40, width=33, dtype=F32, seed=1):
    return np.random.default_rng(seed).standard_normal((n, height, width, 3)).astype(dtype)


def copy_of(model):
    other = network(type(model), model.device, model.dtype, decoder=model.decoder_kind)
    for name, parameter in other.named_parameters().items():
        model.device.write(parameter.data, model.named_parameters()[name].data)
    for name, buffer in other.named_buffers().items():
        model.device.write(buffer.data, model.named_buffers()[name].data)
    return other.eval()


@pytest.mark.parametrize("device", ["numpy", "host"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_unit_gives_what_it_gave_to_rounding(device, dtype):
    """Both ways round sums of K products, and what is added to them, a few times: 4 eps (sqrt(K) + 2) of the terms."""
    model = network(device=device, dtype=dtype)
    rng = np.random.default_rng(2)
    for name, unit in model.named_modules(ConvUnit).items():
        o, kh, kw, c = unit.conv.weight.shape
        x = rng.standard_normal((2, 6, 5, c)).astype(dtype)
        with no_grad():
            before = unit(tensor(x, device)).numpy().astype(F64)
            factor = unit.bn.weight.numpy() / np.sqrt(unit.bn.running_var.data.astype(F64) + 1e-5)
            scaled = np.abs(unit.conv.weight.numpy() * factor[:, None, None, None])
            added = np.abs(unit.bn.running_mean.data * factor) + np.abs(unit.bn.bias.numpy())
            unit.fold_batch_norm()
            after = unit(tensor(x, device)).numpy().astype(F64)
            terms = conv2d(tensor(np.abs(x).astype(F64), "numpy"), tensor(scaled, "numpy"), padding=kh // 2).numpy()
        bound = 4 * np.finfo(dtype).eps * (sqrt(kh * kw * c) + 2) * (terms + added)
        assert after.shape == before.shape == (2, 6, 5, o)
        assert (np.abs(after - before) <= bound).all(), name
        assert np.ptp(before) > 0.1


def deviations(model, x):
    """Standard deviation that rounding gives each logit: errors of mixed sign, spread by the squares of the weights."""
    eps = np.finfo(x.dtype).eps
    x = tensor(x, "numpy")
    variance = tensor(np.zeros(x.shape, x.dtype), "numpy")
    codes = []
    for block in model.blocks:
        if block.unpool:
            code = codes.pop()
            x, variance = max_unpool(x, code), max_unpool(variance, code)
        unit = (model.decoder if block.decoder else model.encoder)[block.stage][block.index]
        variance = spread(unit.conv, x, variance, eps)
        x = unit(x)
        if block.pool:
            x, code = max_pool(x)
            variance = max_pool(variance)[0]
            codes.append(code)
    return np.sqrt(spread(model.classifier, x, variance, eps).numpy())


def spread(conv, x, variance, eps):
    squared = tensor(conv.weight.numpy() ** 2, "numpy")
    terms = variance.numpy() + (4 * eps * x.numpy()) ** 2
    spread_out = conv2d(tensor(terms, "numpy"), squared, padding=conv.padding).numpy()
    return tensor(spread_out + (4 * eps * conv.bias.numpy()) ** 2, "numpy")


@pytest.mark.parametrize("seed", range(3))
def test_the_logits_stay_within_the_bound_of_all_layers_together(seed):
    # In float64, where no near tie of a pool is decided by rounding: see docs/explanation/numerics.md.
    model, x = network(dtype=F64, seed=seed), images(dtype=F64)
    with no_grad():
        before = model(x).numpy()
        after = model.fold_batch_norm()(x).numpy()
        bound = 6 * deviations(model, x)
    assert np.ptp(before) > 0.1
    assert np.abs(after - before).max() > 0
    assert (np.abs(after - before) <= bound).all()
    assert bound.max() < 1e-10 * np.abs(before).max()


@pytest.mark.parametrize(("cls", "decoder"), NETWORKS)
def test_every_network_folds(cls, decoder):
    model, x = network(cls, dtype=F64, decoder=decoder), images(dtype=F64)
    with no_grad():
        before = model(x).numpy()
        assert model.fold_batch_norm() is model
        np.testing.assert_allclose(model(x).numpy(), before, rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(model.fold_batch_norm()(x).numpy(), model(x).numpy())  # again: nothing left
    assert not any("bn" in name for name in (*model.named_parameters(), *model.named_buffers()))
    assert not any(unit.conv.weight.requires_grad for unit in model.named_modules(ConvUnit).values())


def test_a_checkpoint_is_folded_as_it_is_loaded(tmp_path):
    model = network()
    weights.save(tmp_path / "a.safetensors", model, {"classes": list("abcde")})
    plain, folded = load(tmp_path / "a.safetensors", "numpy"), load(tmp_path / "a.safetensors", "numpy", fold=True)
    assert folded.folded
    assert not plain.folded
    assert folded.metadata == plain.metadata
    model.fold_batch_norm()
    with no_grad():
        np.testing.assert_array_equal(folded(images()).numpy(), model(images()).numpy())


def test_the_statistics_are_those_of_evaluation():
    model, x = network(dtype=F64).train(), images(dtype=F64)
    with no_grad():
        expected = copy_of(model)(x).numpy()
        np.testing.assert_allclose(model.fold_batch_norm()(x).numpy(), expected, rtol=1e-10, atol=1e-10)
    assert not model.training


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda model, path: model.train(), TrainingError, r"SegNet: batch norm is folded.*without fold=True"),
        (lambda model, path: SGD(model), TrainingError, "sgd: batch norm is folded"),
        (lambda model, path: model.state_dict(), CheckpointError, r"state_dict\(\): batch norm is folded"),
        (lambda model, path: model.load_state_dict({}), CheckpointError, r"load_state_dict\(\): batch norm is folded"),
        (lambda model, path: model.load_vgg16({}), CheckpointError, r"load_vgg16\(\): batch norm is folded"),
        (lambda model, path: weights.save(path / "a", model, {}), CheckpointError, "batch norm is folded"),
    ],
    ids=["train", "SGD", "state_dict", "load_state_dict", "load_vgg16", "save"],
)
def test_what_needs_batch_norm_is_refused(tmp_path, call, error, part):
    model = network().fold_batch_norm()
    with pytest.raises(error, match=part):
        call(model, tmp_path)
    assert not any(tmp_path.iterdir())
    assert not model.eval().training
