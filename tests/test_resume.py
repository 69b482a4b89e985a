"""A run stopped at any step goes on with the same bits: weights, momenta, running statistics, order of images, losses.

By default three of the twenty stops; with SEGNET_TEST_FULL=1 all of them. What resuming does in every variant of a run
is in test_train.py.
"""

import signal

import pytest
from support import FULL

from segnet_scratch import weights
from segnet_scratch.config import Config
from segnet_scratch.data import Loader, write_sample
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.train import Listener, Trainer

STEPS = 20
STOPS = range(1, STEPS + 1) if FULL else (1, 10, 17)  # 10: the end of the first epoch
SETTINGS = {
    "model": "segnet",
    "width": 1 / 32,
    "size": 32,
    "batch": 2,
    "lr": 0.05,
    "dropout": True,
    "epochs": 2,
    "workers": 0,
}


@pytest.fixture(scope="module")
def twenty_images(tmp_path_factory):
    """Ten steps an epoch."""
    return write_sample(tmp_path_factory.mktemp("data") / "sample", train=20, val=2, size=(48, 64))


@pytest.fixture
def order(monkeypatch):
    """The images that training has been given since, batch by batch."""
    seen = []
    epoch = Loader.epoch

    def watched(self, *arguments, **keywords):
        for batch in epoch(self, *arguments, **keywords):
            seen.append(batch.ids)
            yield batch

    monkeypatch.setattr(Loader, "epoch", watched)
    return seen


class StopAt(Listener):
    def __init__(self, step):
        self.step = step

    def stepped(self, trainer, loss, lr):
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGINT)


def run(data, out, listener=None, resume=False):
    return Trainer(Config(**SETTINGS), data, out, "numpy", resume=resume).run(listener)


def test_a_stop_at_each_step(twenty_images, tmp_path, order):
    run(twenty_images, tmp_path / "unbroken")
    unbroken, order[:] = list(order), []
    assert len(unbroken) == STEPS
    assert sorted(sum(unbroken[:10], ())) == sorted(sum(unbroken[10:], ()))  # two epochs
    assert unbroken[:10] != unbroken[10:]
    rows = MetricsLog.read(tmp_path / "unbroken" / "metrics.jsonl")
    state, momenta, _ = weights.read(tmp_path / "unbroken" / "last.safetensors")
    for stop in STOPS:
        out = tmp_path / str(stop)
        assert not run(twenty_images, out, StopAt(stop))  # nor at the last one: its validation is still due
        assert len(order) == stop
        assert run(twenty_images, out, resume=True)
        assert order == unbroken, stop
        order.clear()
        assert MetricsLog.read(out / "metrics.jsonl") == rows, stop
        resumed, resumed_momenta, _ = weights.read(out / "last.safetensors")
        for found, expected in ((resumed, state), (resumed_momenta, momenta)):
            assert {name: array.tobytes() for name, array in found.items()} == {
                name: array.tobytes() for name, array in expected.items()
            }, stop
        for name in ("last.safetensors", "best.safetensors"):  # and what else they hold
            assert (out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), stop
