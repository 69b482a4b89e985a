"""The recipes that ship with the package: valid, listed, found by name, and able to train."""

import numpy as np
import pytest
from typer.testing import CliRunner

from segnet_scratch.cli.common import app
from segnet_scratch.config import load_config
from segnet_scratch.errors import ConfigError
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.recipes import find_config, recipes

SMALL = ["width=0.0625", "size=32", "batch=2", "steps=2", "workers=0", "class_weights=[]", "lr=1e-3"]


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_valid_and_trains(sample, tmp_path, name):
    load_config(find_config(name))  # as it is
    settings = [part for setting in SMALL for part in ("--set", setting)]
    arguments = ["train", "--data", sample, "--out", tmp_path / "run", "--device", "numpy", "--config", name, *settings]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    losses = [row["loss"] for row in MetricsLog.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_they_are_listed_with_their_purpose():
    output = CliRunner().invoke(app, ["recipes"]).output
    for name, purpose in recipes().items():
        assert f"{name} " in output
        assert len(purpose) > 20
        assert purpose in output


def test_an_unknown_name_lists_them_and_a_file_comes_first(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"--config quick: .*demo, quick-cpu"):
        find_config("quick")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("batch = 3\n")
    assert load_config(find_config("demo")).batch == 3
