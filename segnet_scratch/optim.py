"""SGD with momentum over a model's parameters, and learning-rate schedules."""

from collections.abc import Mapping

import numpy as np

from segnet_scratch.errors import CheckpointError, TrainingError
from segnet_scratch.ops.sgd import SgdStep
from segnet_scratch.segnet import SegNet, from_file_layout, to_file_layout


class SGD:
    """m = momentum m + g + decay w; w = w - lr m, for every parameter of a model, in one launch.

    Biases and batch-norm parameters do not decay. Their learning rate is `bias_lr` times that of the weights (the
    authors' Caffe models use 2).
    """

    def __init__(self, model: SegNet, momentum: float = 0.9, decay: float = 5e-4, bias_lr: float = 1.0) -> None:
        self.model = model
        self.parameters = model.named_parameters()
        device = model.device
        self.momenta = {name: device.zeros(p.shape, p.dtype) for name, p in self.parameters.items()}
        self._lr = device.zeros((1,), np.float64)
        weights = [len(p.shape) == 4 for p in self.parameters.values()]
        self._step = SgdStep(
            device,
            [p.data for p in self.parameters.values()],
            list(self.momenta.values()),
            rates=[1.0 if weight else bias_lr for weight in weights],
            decays=[decay if weight else 0.0 for weight in weights],
            momentum=momentum,
        )

    def step(self, lr: float) -> None:
        """Moves every parameter along its gradient; all must have one."""
        self.set_rate(lr)
        self.update()

    def set_rate(self, lr: float) -> None:
        """The first half of `step`: the learning rate, which lies on the device."""
        self.model.device.write(self._lr, np.array([lr]))

    def update(self) -> None:
        """The second half of `step`: what `device.capture` can record."""
        gradients = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise TrainingError(f"sgd: {name} has no gradient; call loss.backward() before step()")
            gradients.append(parameter.grad)
        self._step(gradients, self._lr)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The momentum of every parameter, by the parameter's name, in the layout of checkpoints."""
        return {name: to_file_layout(self.model.device.download(m)) for name, m in self.momenta.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Overwrites the momenta; CheckpointError unless every name and shape fits."""
        if unknown := sorted(state.keys() - self.momenta.keys()):
            raise CheckpointError(f"there is no parameter {unknown[0]} for its momentum; the file is of another model")
        for name, momentum in self.momenta.items():
            if name not in state or from_file_layout(state[name]).shape != tuple(momentum.shape):
                got = state[name].shape if name in state else "nothing"
                raise CheckpointError(f"the momentum of {name} does not fit: got {got}; the file is of another model")
        for name, momentum in self.momenta.items():
            self.model.device.write(momentum, from_file_layout(state[name]).astype(momentum.dtype))


def learning_rate(step: int, total: int, lr: float, schedule: str, poly_power: float = 0.9, warmup: int = 0) -> float:
    """The learning rate of step 0, 1, ... total - 1.

    "constant" stays at `lr`; "poly" falls as lr (1 - step / total)^poly_power (DeepLab, arXiv 1606.00915). The first
    `warmup` steps rise linearly to it.
    """
    rate = lr * (1 - step / total) ** poly_power if schedule == "poly" else lr
    return rate * min(1.0, (step + 1) / (warmup + 1))
