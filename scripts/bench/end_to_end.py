"""`segnet train`, the command itself, beside the bare training step that it makes: images a second, in one run.

The command is run for one epoch and for a number of steps more; the difference of the two times is that of the steps,
whatever starting, compiling and reading the first epoch take. Both are repeated, in turn with blocks of the bare step
on batches that lie on the device.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from bench.run import console
from segnet_scratch.config import load_config
from segnet_scratch.data import VOCDataset, write_sample
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.train import Trainer

# By the cache of decoded samples: the share of the bare step's rate that the command is to reach.
TARGETS = {"device": 0.95, "memory": 0.9}
IMAGES, ROUNDS = 64, 3


def measure(device: str, batch: int, size: int, width: float, seconds: float, data: Path | None) -> dict[str, Any]:
    """Images a second of the bare step and of the command with each cache; prints them and their ratios.

    Each measurement is of about so many `seconds`; the data are sample data unless given.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(data or write_sample(Path(folder) / "data", IMAGES, 1))
        settings = [f"batch={batch}", f"size={size}", f"width={width}", "val_split=none", "checkpoint_every=0"]
        config = load_config(None, [*settings, "epochs=1"])
        epoch = max(1, len(VOCDataset(root, config.train_split)) // batch)
        trainer = Trainer(config, root, Path(folder) / "bare", device)
        bare = _Bare(trainer)
        steps = max(1, round(seconds / bare.seconds(2)))
        found: dict[str, list[float]] = {"bare step": []}
        for turn in range(ROUNDS):
            found["bare step"].append(bare.seconds(steps))
            for cache in TARGETS:
                more = [f"steps={epoch + number * steps}" for number in (0, 1)]
                taken = [
                    _command(root, Path(folder) / f"{cache}{turn}{key}", device, [*settings, f"cache={cache}", key])
                    for key in more
                ]
                found.setdefault(cache, []).append((taken[1] - taken[0]) / steps)
    rates = {name: batch / median(values) for name, values in found.items()}
    resolved = trainer.config
    console.print(
        f"training, {batch} x {size}x{size}, width {width:g}, on {get_device(device).gpu or device}, {resolved.engine} "
        f"engine in {resolved.precision}: bare step {rates['bare step']:.2f} images/s"
    )
    for cache, target in TARGETS.items():
        ratio = rates[cache] / rates["bare step"]
        verdict = f"target {target}: {'met' if ratio >= target else 'MISSED'}"
        console.print(f"segnet train, cache = {cache}: {rates[cache]:.2f} images/s, {ratio:.3f} of the step, {verdict}")
    return {"seconds_a_step": found, "images_a_second": rates, "steps": steps}


class _Bare:
    """The trainer's own step on one batch that lies on the device."""

    def __init__(self, trainer: Trainer) -> None:
        self._step, self._device = trainer.training, trainer.model.device
        batch = next(iter(trainer.loader.epoch(0)))
        self._images, self._labels = (self._device.upload(array) for array in (batch.images, batch.labels))
        self.seconds(2)  # loads kernels, records

    def seconds(self, count: int) -> float:
        """Of one step, the mean of so many, with losses read as the trainer does."""
        self._device.synchronise()
        began = perf_counter()
        for number in range(count):
            self._step(self._images, self._labels, 1e-3, number)
        self._step.read().get()
        return (perf_counter() - began) / count


def _command(data: Path, out: Path, device: str, settings: list[str]) -> float:
    sets = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "segnet_scratch", "train", "--data", str(data), "--out", str(out)]
    began = perf_counter()
    done = subprocess.run([*command, "--device", device, *sets], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: segnet train: {done.stderr.strip()[-2000:]}")
    return perf_counter() - began
