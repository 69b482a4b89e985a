"""NaN and infinity, put in at each layer, forward and backward: training stops within the step and names the layer."""

import numpy as np
import pytest

from segnet_scratch import weights
from segnet_scratch.config import Config
from segnet_scratch.errors import DeviceMemoryError, TrainingError
from segnet_scratch.nan_guard import first_not_finite
from segnet_scratch.nn.autograd import Function
from segnet_scratch.segnet import segnet_blocks
from segnet_scratch.train import Listener, Trainer

LAYERS = [block.name for block in segnet_blocks(1 / 64, dropout=False)] + ["classifier"]
GOOD_STEPS = 1  # one step, with its checkpoint, goes before
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the arithmetic with NaN


class Broken(Function):
    """x, with a bad number put into it on the way forward, or into the gradient on the way back."""

    def __init__(self, device, value, where):
        super().__init__(device)
        self.value, self.where = value, where

    def forward(self, x):
        return self._spoil(x) if self.where == "forward" else x + 0

    def backward(self, dy):
        return (self._spoil(dy) if self.where == "backward" else dy,)

    def _spoil(self, array):
        array = array.copy()
        array[...] = self.value
        return array


class BreakAfter(Listener):
    """Breaks the output of one layer once `GOOD_STEPS` are made."""

    def __init__(self, layer, value, where):
        self.layer, self.value, self.where = layer, value, where

    def stepped(self, trainer, loss, lr):
        assert trainer.step <= GOOD_STEPS, "it trained on"
        unit = module(trainer.model, self.layer)
        forward = unit.forward
        unit.forward = lambda *inputs: Broken(trainer.model.device, self.value, self.where)(forward(*inputs))


def module(model, layer):
    if layer == "classifier":
        return model.classifier
    half, stage, index = layer.split(".")
    return getattr(model, half)[int(stage)][int(index)]


def stop(sample, out, listener, device="numpy", model="segnet"):
    """The message that training ended with; the last good checkpoint and log are seen to be left."""
    settings = {"model": model, "width": 1 / 64, "size": 32, "batch": 2, "steps": 4, "workers": 0}
    config = Config(**settings, checkpoint_every=1, validate_every=100)
    trainer = Trainer(config, sample, out, device)
    with pytest.raises(TrainingError) as raised:
        trainer.run(listener)
    state, momenta, metadata = weights.read(out / "last.safetensors")
    assert metadata["step"] == trainer.step == GOOD_STEPS
    assert all(np.isfinite(array).all() for array in (*state.values(), *momenta.values()))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == GOOD_STEPS
    return str(raised.value)


@pytest.mark.parametrize("layer", LAYERS)
def test_forward_names_the_layer(sample, tmp_path, layer):
    value = np.nan if LAYERS.index(layer) % 2 else np.inf
    assert f"first in: output of {layer};" in stop(sample, tmp_path, BreakAfter(layer, value, "forward"))


@pytest.mark.parametrize("layer", LAYERS)
def test_backward_names_the_layer(sample, tmp_path, layer):
    message = stop(sample, tmp_path, BreakAfter(layer, np.nan, "backward"))
    parameter = "bias" if layer == "classifier" else "bn.bias"
    assert f"first in: gradient of {layer}.{parameter};" in message


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_on_the_host_device(sample, tmp_path, where):
    layer = "decoder.2.1"
    expected = "output of decoder.2.1" if where == "forward" else "gradient of decoder.2.1.bn.bias"
    listener = BreakAfter(layer, np.nan, where)
    assert f"first in: {expected};" in stop(sample, tmp_path, listener, "host", "segnet-basic")


def test_where_memory_does_not_suffice_to_look_it_is_still_the_loss_that_is_named(sample, tmp_path, monkeypatch):
    def no_memory(*arguments):
        raise DeviceMemoryError("out of memory", 2, 1)

    monkeypatch.setattr("segnet_scratch.train.first_not_finite", no_memory)
    message = stop(sample, tmp_path, BreakAfter("classifier", np.nan, "forward"), model="segnet-basic")
    assert "the loss is nan at step 2" in message
    assert "first in: not looked for, as memory does not suffice;" in message


class BreakParameter(Listener):
    def __init__(self, name):
        self.name = name

    def stepped(self, trainer, loss, lr):
        trainer.model.named_parameters()[self.name].data.reshape(-1)[0] = np.nan


@pytest.mark.parametrize("layer", LAYERS)
def test_one_bad_weight_is_named(sample, tmp_path, layer):
    name = "classifier.weight" if layer == "classifier" else f"{layer}.conv.weight"
    # checkpoint_every = 1 would refuse to save it first: the break comes after that, at the start of the next step.
    trainer = Trainer(Config(width=1 / 64, size=32, batch=2, steps=1, workers=0), sample, tmp_path, "numpy")
    images = np.random.default_rng(5).standard_normal((2, 32, 32, 3)).astype(np.float32)
    assert first_not_finite(trainer.model, images) is None
    BreakParameter(name).stepped(trainer, 0.0, 0.0)
    before = trainer.model.state_dict()
    assert first_not_finite(trainer.model, images) == name
    for key, array in trainer.model.state_dict().items():
        np.testing.assert_array_equal(array, before[key])  # running statistics too
    images[0, 3, 4, 1] = np.inf
    assert first_not_finite(trainer.model, images) == "images"
