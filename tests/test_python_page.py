"""docs/learn/python.md: what it shows works as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

from segnet_scratch import SegNet, load, tensor
from segnet_scratch.data import EvalTransform, Loader, VOCDataset, write_sample
from segnet_scratch.errors import ConfigError
from segnet_scratch.optim import SGD

PAGE = Path(__file__).parents[1] / "docs" / "learn" / "python.md"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_sample(folder / "VOC2012", train=24, val=4, size=(64, 96))
    return folder


def blocks():
    return [
        code.replace('device="auto"', 'device="numpy"')
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    ]


def test_the_page(sample, monkeypatch, capsys):
    code, own_loss = blocks()
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    monkeypatch.chdir(sample)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    losses = [float(text) for text in re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert load("by-hand.safetensors", "numpy").metadata["size"] == [64, 96]
    exec(compile(own_loss, str(PAGE), "exec"), names)
    assert 0 < names["loss"].item() < 10
    assert all(np.abs(p.grad).max() > 0 for p in names["model"].parameters())


def test_the_dice_loss_by_hand():
    """Of even probabilities: 2 (n / 3) over N / 3 + n, each with its 1, for a class of n of N pixels."""
    names = {"np": np}
    source = blocks()[1]
    exec(compile(source[: source.index("model.train()")], str(PAGE), "exec"), names)
    labels = np.random.default_rng(5).integers(0, 3, (2, 3, 4)).astype(np.uint8)
    z, labels[0, 1] = np.zeros((2, 3, 4, 3)), 255
    z[0, 1, 0, 1] = 1e3  # what void pixels hold plays no part
    counts = np.bincount(labels[labels != 255], minlength=3)
    expected = 1 - np.mean((2 * counts / 3 + 1) / (counts.sum() / 3 + counts + 1))
    assert names["dice_loss"](tensor(z, "numpy"), labels).item() == pytest.approx(expected, rel=1e-12)


def test_a_loader_is_iterated_epoch_by_epoch(sample):
    loader, again = (Loader(VOCDataset(sample / "VOC2012", "train"), EvalTransform((32, 32)), batch=5) for _ in "ab")
    assert len(loader) == len(list(loader)) == 5
    for epoch in (1, 2):
        names = [batch.ids for batch in loader]
        assert names == [batch.ids for batch in again.epoch(epoch)]
    assert names != [batch.ids for batch in again.epoch(0)]


class TestMultipliers:
    def moved(self, **options):
        """{name: how far the largest element of each parameter went in a step of gradients of 1}."""
        model = SegNet(3, 1 / 32, "numpy")
        before = {name: p.numpy().copy() for name, p in model.named_parameters().items()}
        optimiser = SGD(model, momentum=0, decay=0, **options)
        for parameter in model.parameters():
            parameter.grad = np.ones(parameter.shape, np.float32)
        optimiser.step(lr=0.5)
        return {name: float(np.abs(p.numpy() - before[name]).max()) for name, p in model.named_parameters().items()}

    def test_the_longest_prefix_counts(self):
        moved = self.moved(bias_lr=2.0, multipliers={"encoder": 0.5, "encoder.1": 0.0, "decoder.5.1.bn": 3.0})
        for name, distance in moved.items():
            factor = {"encoder.1": 0.0, "encoder": 0.5, "decoder.5.1.bn": 3.0}
            part = next((p for p in ("encoder.1", "encoder", "decoder.5.1.bn") if name.startswith(f"{p}.")), None)
            expected = (
                0.5
                * factor.get(part, 1.0)
                * (1.0 if name.endswith("conv.weight") or name == "classifier.weight" else 2.0)
            )
            assert distance == pytest.approx(expected, rel=1e-5), name

    @pytest.mark.parametrize("multipliers", [{"encode": 1.0}, {"encoder": -1.0}, {"encoder": np.nan}])
    def test_refused(self, multipliers):
        with pytest.raises(ConfigError, match="multipliers: "):
            SGD(SegNet(3, 1 / 32, "numpy"), multipliers=multipliers)
