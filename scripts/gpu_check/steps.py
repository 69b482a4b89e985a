"""Training steps whose inputs lie in arrays that stay where they are, so that they can be captured."""

import hashlib
from typing import Any

import numpy as np

from segnet_scratch import SegNet
from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.runtime.devices import Array, Device


class Steps:
    """A SegNet, its optimiser, and batches of noise that depend on nothing but their number."""

    def __init__(self, device: Device, batch: int, size: int, width: float, classes: int = 21, **options: Any) -> None:
        self.device, self.classes, self.shape = device, classes, (batch, size, size)
        self.model = SegNet(classes, width, device, seed=1, **options)
        self.optimiser = SGD(self.model)
        self.images = device.zeros((*self.shape, 3), self.model.dtype)
        self.labels = device.zeros(self.shape, np.uint8)

    def data(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of step `number`."""
        rng = np.random.default_rng([3, number])
        images = rng.standard_normal((*self.shape, 3), np.float32).astype(self.model.dtype, copy=False)
        return images, rng.integers(0, self.classes, self.shape, np.uint8)

    def set_inputs(self, number: int, lr: float = 1e-3) -> None:
        """Everything that differs from step to step."""
        for target, values in zip((self.images, self.labels), self.data(number), strict=True):
            self.device.write(target, values)
        self.model.set_random_state(7, number)
        self.optimiser.set_rate(lr)

    def step(self) -> Tensor:
        """Forward, loss, backward, update; the loss."""
        return self.step_on(self.images, self.labels)

    def step_on(self, images: Array, labels: Array) -> Tensor:
        """The same with inputs that lie elsewhere."""
        self.model.zero_grad()
        loss = cross_entropy(self.model(Tensor(images, self.device)), labels)
        loss.backward()
        self.optimiser.update()
        return loss

    def losses(self, count: int) -> list[float]:
        """Of so many steps from the first on."""
        found = []
        for number in range(count):
            self.set_inputs(number)
            found.append(self.step().item())
        return found

    def digest(self) -> str:
        """A hash of all parameters and running statistics."""
        return hashlib.sha256(b"".join(a.tobytes() for a in self.model.state_dict().values())).hexdigest()[:16]
