"""SGD against a loop written out by hand, its state, and learning-rate schedules."""

import numpy as np
import pytest

from segnet_scratch import SegNet, SegNetBasic
from segnet_scratch.config import Config
from segnet_scratch.errors import CheckpointError, TrainingError
from segnet_scratch.ops.optimiser.sgd import CHUNK
from segnet_scratch.optim import SGD, learning_rate


def network(device, width=1 / 16, cls=SegNetBasic, dtype=np.float32):
    return cls(5, width, device, dtype=dtype)


def give_gradients(model, seed):
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        values = rng.standard_normal(parameter.shape).astype(parameter.dtype)
        parameter.grad = model.device.upload(values)


def values(model):
    return {name: p.numpy().copy() for name, p in model.named_parameters().items()}


@pytest.mark.parametrize("device", ["numpy", "host"])
@pytest.mark.parametrize(
    ("width", "dtype", "momentum", "decay", "bias_lr"),
    [
        (1 / 16, np.float32, 0.9, 5e-4, 1.0),
        (1 / 16, np.float64, 0.9, 5e-4, 2.0),
        (1 / 16, np.float32, 0.0, 0.0, 1.0),
        (1 / 16, np.float32, 0.5, 0.1, 0.0),
        (0.35, np.float32, 0.9, 0.1, 2.0),  # 22 channels: weights of 23716 elements, more than one chunk, no multiple
    ],
    ids=["default", "double, bias rate 2", "plain", "frozen biases", "several chunks"],
)
def test_steps_are_those_of_the_formula(device, width, dtype, momentum, decay, bias_lr):
    model = network(device, width, dtype=dtype)
    sizes = {p.data.size for p in model.parameters()}
    assert len(sizes) > 3
    assert (max(sizes) > CHUNK and max(sizes) % CHUNK) if width > 0.3 else max(sizes) < CHUNK
    optimiser = SGD(model, momentum, decay, bias_lr)
    w = {name: value.astype(np.float64) for name, value in values(model).items()}
    m = {name: np.zeros_like(value) for name, value in w.items()}
    for step, lr in enumerate((0.1, 0.03, 0.01)):
        give_gradients(model, step)
        for name, parameter in model.named_parameters().items():
            is_weight = name.endswith("conv.weight") or name == "classifier.weight"
            g = parameter.grad.astype(np.float64) + (decay * w[name] if is_weight else 0)
            m[name] = momentum * m[name] + g
            w[name] = w[name] - lr * (1 if is_weight else bias_lr) * m[name]
        optimiser.step(lr)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    found, momenta = values(model), optimiser.state_dict()
    for name in w:
        np.testing.assert_allclose(found[name], w[name], rtol=tolerance, atol=tolerance, err_msg=name)
        held = momenta[name].transpose(0, 2, 3, 1) if momenta[name].ndim == 4 else momenta[name]
        np.testing.assert_allclose(held, m[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("device", ["numpy", "host"])
def test_a_missing_gradient_is_named_and_nothing_moves(device):
    model = network(device)
    optimiser = SGD(model)
    give_gradients(model, 0)
    model.decoder[2][1].bn.bias.grad = None
    before = values(model)
    with pytest.raises(TrainingError, match=r"decoder\.2\.1\.bn\.bias has no gradient.*backward"):
        optimiser.step(0.1)
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("device", ["numpy", "host"])
def test_a_loaded_state_goes_on_with_the_same_bits(device):
    first, second = network(device), network(device)
    a, b = SGD(first), SGD(second)
    give_gradients(first, 0)
    a.step(0.1)
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    for model, optimiser in ((first, a), (second, b)):
        give_gradients(model, 1)
        optimiser.step(0.1)
    for name, value in values(first).items():
        np.testing.assert_array_equal(value, values(second)[name])
    for name, value in a.state_dict().items():
        np.testing.assert_array_equal(value, b.state_dict()[name])


def test_state_has_the_names_and_layout_of_checkpoints():
    model = network("numpy", cls=SegNet)
    state = SGD(model).state_dict()
    weights = model.state_dict()
    assert state.keys() == model.named_parameters().keys()
    assert all(state[name].shape == weights[name].shape and state[name].dtype == np.float32 for name in state)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda s: s.pop("classifier.bias"), "classifier.bias does not fit: got nothing"),
        (lambda s: s.update({"classifier.bias": np.ones(6, np.float32)}), r"classifier.bias does not fit: got \(6,\)"),
        (lambda s: s.update(other=np.ones(6, np.float32)), "no parameter other"),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_a_wrong_state_is_refused_and_changes_nothing(change, part):
    optimiser = SGD(network("numpy"))
    state = {name: np.ones_like(value) for name, value in optimiser.state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError, match=part):
        optimiser.load_state_dict(state)
    assert all((value == 0).all() for value in optimiser.state_dict().values())


# Learning rate


def rates(total=10, schedule="constant", **options):
    return [learning_rate(step, total, Config(lr=0.5, schedule=schedule, **options)) for step in range(total)]


def test_constant_rate():
    assert rates() == [0.5] * 10


def test_poly_falls_from_lr_towards_zero():
    found = rates(schedule="poly")
    assert found == pytest.approx([0.5 * (1 - step / 10) ** 0.9 for step in range(10)])
    assert found[0] == 0.5
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.5 * 0.1**0.9)
    assert rates(schedule="poly", poly_power=1.0) == pytest.approx([0.5 * (10 - step) / 10 for step in range(10)])


def test_warmup_rises_linearly_and_then_leaves_the_schedule_alone():
    assert rates(warmup=4) == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.5] * 6)
    plain, warm = rates(schedule="poly"), rates(schedule="poly", warmup=4)
    assert warm[4:] == plain[4:]
    assert warm[:4] == pytest.approx([plain[step] * (step + 1) / 5 for step in range(4)])
