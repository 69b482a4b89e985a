"""Training runs by the fused engine: the same run as by the layers, the same bits after a break, files for both."""

import numpy as np
import pytest
from support.training import TINY, assert_same_run, losses, start, train

from segnet_scratch.errors import ConfigError

FUSED = {"engine": "fused", "width": 1 / 8}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_norm": 0.5, "label_smoothing": 0.1, "class_weights": "median-frequency", "loss_normalisation": "valid"},
    ],
    ids=["plain", "clipped, smoothed, weighted"],
)
def test_a_run_is_that_of_the_layers(sample, tmp_path, settings):
    train(sample, tmp_path / "layers", steps=8, width=1 / 8, **settings)
    train(sample, tmp_path / "fused", steps=8, **FUSED, **settings)
    np.testing.assert_allclose(losses(tmp_path / "fused"), losses(tmp_path / "layers"), rtol=1e-4)


def test_it_goes_on_with_the_same_bits(sample, tmp_path):
    settings = {**FUSED, "precision": "bf16", "steps": 6, "checkpoint_every": 3, "validate_every": 3}
    train(sample, tmp_path / "whole", **settings)
    train(sample, tmp_path / "parts", **settings | {"steps": 3})
    train(sample, tmp_path / "parts", resume=True, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_initial_weights_reach_the_kernels(sample, tmp_path):
    train(sample, tmp_path / "first", steps=2, **FUSED, precision="bf16")
    init = tmp_path / "first" / "last.safetensors"
    trainer = start(sample, tmp_path / "second", init=str(init), steps=2, **FUSED, precision="bf16")
    model, moved = trainer.model, trainer.training.optimiser._moved
    copies = {name: moved[f"copy{i}"] for i, name in enumerate(model.named_parameters()) if f"copy{i}" in moved}
    assert len(copies) == 9
    for name, copy in copies.items():
        parameter = model.named_parameters()[name].numpy()
        np.testing.assert_array_equal(copy[: len(parameter)], parameter.astype(copy.dtype), err_msg=name)


def test_on_the_host_device(sample, tmp_path):
    settings = {**TINY, **FUSED, "precision": "bf16", "steps": 2, "validate_every": 2}
    train(sample, tmp_path / "host", device="host", **settings)
    train(sample, tmp_path / "numpy", **settings)
    np.testing.assert_allclose(losses(tmp_path / "host"), losses(tmp_path / "numpy"), rtol=1e-3)


def test_what_it_does_not_train_is_refused(sample, tmp_path):
    with pytest.raises(ConfigError, match=r"pieces of 4 channels, and encoder.* has 6 at width"):
        start(sample, tmp_path / "run", engine="fused", width=0.1, steps=1)
    with pytest.raises(ConfigError, match=r"has no dropout.*set engine"):
        start(sample, tmp_path / "run", dropout=True, steps=1, **FUSED)
    assert not (tmp_path / "run").exists()
