"""Small trainings, and what their run folders hold."""

from pathlib import Path

from segnet_scratch.config import Config
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.parallel import ALONE
from segnet_scratch.train import Listener, Trainer

FILES = {"config.toml", "metrics.jsonl", "last.safetensors", "best.safetensors"}
# Four steps an epoch, twelve milliseconds a step.
TINY = {"model": "segnet-basic", "width": 1 / 16, "size": 32, "batch": 2, "lr": 0.05, "workers": 0}


def start(data, out, device="numpy", resume=False, ranks=ALONE, **settings):
    return Trainer(Config(**TINY | settings), data, out, device, resume, ranks)


def train(data, out, *listeners, **options):
    trainer = start(data, out, **options)
    return trainer, trainer.run(*listeners)


def rows(out):
    return MetricsLog.read(Path(out) / "metrics.jsonl")


def losses(out):
    return [row["loss"] for row in rows(out) if "loss" in row]


def steps(out):
    return [row["step"] for row in rows(out) if "loss" in row]


def assert_same_run(a, b):
    """The same rows, and the same bytes of weights, momenta, running statistics and metadata."""
    assert rows(a) == rows(b)
    for name in ("last.safetensors", "best.safetensors"):
        assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes(), name
    assert {path.name for path in Path(b).iterdir()} - {"sessions.json"} == FILES  # that is the command line's


class Recorder(Listener):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def started(self, trainer):
        self.told.append("started")

    def stepped(self, trainer, loss, lr):
        self.told.append(trainer.step)

    def validating(self, images):
        self.told.append("validating")

    def validated(self, trainer, evaluation):
        self.told.append(evaluation)


class At(Listener):
    """Does something after a certain step, or at the first batch of the validation after it."""

    def __init__(self, step, act, validating=False):
        self.step, self.act, self.in_validation, self.reached = step, act, validating, 0

    def stepped(self, trainer, loss, lr):
        self.reached = trainer.step
        if trainer.step == self.step and not self.in_validation:
            self.act()

    def validating(self, images):
        if self.reached == self.step and self.in_validation:
            self.act()
            self.reached = 0
