"""scripts/train_parity.py gives both sides the same settings, or refuses them."""

import os
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is the other side: pip install -e .[oracle]")

import train_parity
from train_parity import ERROR_RATE, HONOURED, WITHOUT_EFFECT, Ours, Torch, chance, check_settings, compared

from segnet_scratch.config import Config
from segnet_scratch.data import Batch, VOCDataset
from segnet_scratch.errors import ConfigError
from segnet_scratch.segnet import SegNetBasic

REFUSED = {"pooling": "floor", "dropout": True, "accumulate": 2, "engine": "fused", "precision": "tf32", "patience": 3}
SETTINGS = (
    {},
    {"bias_lr": 5.0},
    {"encoder_lr": 0.0},
    {"decay": 0.3},
    {"clip_norm": 0.05},
    {"label_smoothing": 0.3},
    {"loss_normalisation": "valid", "class_weights": (0.1, 5.0, 1.0)},
    {"class_weights": (0.1, 5.0, 1.0)},
    {"decoder": "bilinear"},
    {"momentum": 0.0},
)


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_of_one_side_is_refused(key):
    with pytest.raises(ConfigError, match=f"train_parity: {key} = .* is not for both sides"):
        check_settings(replace(Config(), **{key: REFUSED[key]}))


def test_every_setting_is_heeded_or_refused():
    assert vars(Config()).keys() >= HONOURED | WITHOUT_EFFECT
    assert not HONOURED & (WITHOUT_EFFECT | REFUSED.keys())
    check_settings(replace(Config(), lr=0.5, bias_lr=2.0, workers=0, short_side=(40, 50)))


def losses(setting, of_torch):
    """Of four steps by either side, under one setting or under two unlike ones."""
    config = replace(Config(), model="segnet-basic", width=1 / 16, **setting)
    model = SegNetBasic(3, config.width, "numpy", decoder=config.decoder, seed=1)
    weights = np.array(config.class_weights, np.float32) if config.class_weights else None
    side = Torch(config, 3, model.state_dict(), weights) if of_torch else Ours(config, model, weights)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (2, 32, 32)).astype(np.uint8)
    labels[0, :5] = 255
    return np.array([side.step(Batch(images, labels, ("a", "b")), 0.05) for _ in range(4)])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_both_sides_heed_a_setting(setting):
    ours, theirs = losses(setting, of_torch=False), losses(setting, of_torch=True)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)
    if setting:  # and it has an effect that one side alone would not survive
        assert np.abs(theirs - losses({}, of_torch=True)).max() > 1e-3


class TooFast(Ours):
    def step(self, batch, lr):
        return super().step(batch, 1.05 * lr)


def decays_biases(config, model, weights):
    side = Torch(config, model.classes, model.state_dict(), weights)
    for group in side.optimiser.param_groups:
        group["weight_decay"] = config.decay
    return side


@pytest.mark.skipif("SEGNET_TEST_FULL" not in os.environ, reason="trains for a minute: set SEGNET_TEST_FULL=1")
@pytest.mark.parametrize("ours", [Ours, TooFast, decays_biases], ids=lambda ours: ours.__name__)
def test_the_verdict_finds_a_planted_fault_and_passes_what_is_right(ours, sample, monkeypatch):
    monkeypatch.setattr(train_parity, "Ours", ours)
    config, data = replace(Config(), width=1 / 16, size=32, batch=2, lr=0.01), VOCDataset(sample, "train")
    p = chance([compared(config, seed, data, "numpy", None, None) for seed in range(8)])
    assert (p < ERROR_RATE) == (ours is not Ours), p


def test_the_error_rate_is_what_it_says():
    """Of differences that are nothing but chance, of any size and distribution."""
    rng = np.random.default_rng(0)
    for draw in (rng.standard_normal, rng.standard_cauchy, lambda n: rng.choice([-1.0, 1.0], n) * 1e-8):
        assert np.mean([chance(draw(8)) < ERROR_RATE for _ in range(200)]) < 4 * ERROR_RATE
    assert chance([1.0] * 8) == 1 / 256
    assert chance([-1.0] * 8) == 1
    assert chance([1.0] * 7 + [np.nan]) == 0
    assert chance([1.0, -1.0] * 4) == (1 + 70 / 256) / 2
