"""Training steps on batches of noise."""

import hashlib
from typing import Any

import numpy as np

from segnet_scratch import SegNet
from segnet_scratch.runtime.devices import Device
from segnet_scratch.step import TrainingStep


class Steps:
    """A SegNet, its training step, and batches of noise that depend on nothing but their number."""

    def __init__(self, device: Device, batch: int, size: int, width: float, classes: int = 21, **options: Any) -> None:
        self.device, self.classes, self.shape = device, classes, (batch, size, size)
        self.model = SegNet(classes, width, device, seed=1, **options)
        self.step = TrainingStep(self.model, seed=7)

    def data(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of step `number`."""
        rng = np.random.default_rng([3, number])
        images = rng.standard_normal((*self.shape, 3), np.float32).astype(self.model.dtype, copy=False)
        return images, rng.integers(0, self.classes, self.shape, np.uint8)

    def write(self, number: int) -> None:
        """Everything that differs from step to step."""
        self.step.write(*self.data(number), 1e-3, number)

    @property
    def loss(self) -> float:
        """Of the last step; waits for it."""
        return self.step.read().get()[0]

    def losses(self, count: int) -> list[float]:
        """Of so many steps from the first on."""
        found = []
        for number in range(count):
            self.write(number)
            self.step.run()
            found.append(self.loss)
        return found

    def digest(self) -> str:
        """A hash of all parameters and running statistics."""
        return hashlib.sha256(b"".join(a.tobytes() for a in self.model.state_dict().values())).hexdigest()[:16]
