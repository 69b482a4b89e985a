"""SGD with momentum over a model's parameters, and learning-rate schedules."""

from collections.abc import Mapping, Sequence
from math import inf

import numpy as np

from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.errors import CheckpointError, TrainingError
from segnet_scratch.ops.optimiser.gradient_norm import GradientNorm
from segnet_scratch.ops.optimiser.sgd import SgdStep
from segnet_scratch.ops.optimiser.sgd_pack import SgdPackStep
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet, from_file_layout, to_file_layout


class SGD:
    """m = momentum m + scale g + decay w; w = w - lr m, for every parameter of a model, in one launch.

    Biases and batch-norm parameters do not decay. Their learning rate is `bias_lr` times that of the weights (the
    authors' Caffe models use 2). Where all gradients together are longer than `clip_norm`, `scale` makes them that
    long; else, and without `clip_norm` (0), it is 1. `working` are the fused engine's weights, kept up to date.
    """

    def __init__(
        self,
        model: SegNet,
        momentum: float = 0.9,
        decay: float = 5e-4,
        bias_lr: float = 1.0,
        clip_norm: float = 0.0,
        working: WorkingWeights | None = None,
    ) -> None:
        if model.folded:
            raise TrainingError("sgd: batch norm is folded into this network, which leaves nothing to train")
        self.model, self.clip_norm = model, clip_norm
        self.parameters = model.named_parameters()
        device = model.device
        self.momenta = {name: device.zeros(p.shape, p.dtype) for name, p in self.parameters.items()}
        self._lr = device.zeros((1,), np.float64)
        arrays = [p.data for p in self.parameters.values()]
        weights = [len(p.shape) == 4 for p in self.parameters.values()]
        rates = [1.0 if weight else bias_lr for weight in weights]
        decays = [decay if weight else 0.0 for weight in weights]
        step = device, arrays, list(self.momenta.values()), rates, decays, momentum
        if working is None:
            self._step = SgdStep(*step)
        else:
            copies, flipped = ([of.get(name) for name in self.parameters] for of in (working.copies, working.flipped))
            self._step = packing = SgdPackStep(*step, copies, flipped, working.storage)
            working.refresh = packing.refresh
            working.refresh()
        self._scale = device.upload(np.ones(1))
        self.norm = device.zeros((1,), np.float64)  # of all gradients together, before clipping
        self._norm = GradientNorm(
            device,
            arrays,
            largest=clip_norm or inf,
            squares=device.zeros((len(arrays),), np.float64),
            norm=self.norm,
            scale=self._scale,
            partials=device.zeros((len(self._step.table.chunks),), np.float64),
        )
        self._measured = False

    def measure(self) -> Array:
        """The norm of the gradients, float64 (1) on the device, and from it the scale of the next step."""
        self._norm(self._gradients())
        self._measured = True
        return self.norm

    def step(self, lr: float) -> None:
        """Moves every parameter along its gradient; all must have one."""
        self.set_rate(lr)
        self.update()

    def set_rate(self, lr: float) -> None:
        """The first half of `step`: the learning rate, which lies on the device."""
        self.model.device.write(self._lr, np.array([lr]))

    def update(self) -> None:
        """The second half of `step`: what `device.capture` can record. Measures first where clipping has to."""
        if self.clip_norm and not self._measured:
            self.measure()
        self._step(self._gradients(), self._lr, self._scale)
        self._measured = False

    def _gradients(self) -> list[Array]:
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise TrainingError(f"sgd: {name} has no gradient; call loss.backward() before step()")
        return [parameter.grad for parameter in self.parameters.values()]

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


def learning_rate(
    step: int,
    total: int,
    lr: float,
    schedule: str,
    poly_power: float = 0.9,
    warmup: int = 0,
    lr_steps: Sequence[float] = (),
    lr_gamma: float = 0.1,
) -> float:
    """The learning rate of step 0, 1, ... total - 1.

    "constant" stays at `lr`; "poly" falls as lr (1 - step / total)^poly_power (DeepLab, arXiv 1606.00915); "step" is
    multiplied by `lr_gamma` at each of `lr_steps`, which are steps, or below 1 shares of `total`. The first `warmup`
    steps rise linearly to the schedule.
    """
    rate = lr
    if schedule == "poly":
        rate *= (1 - step / total) ** poly_power
    elif schedule == "step":
        rate *= lr_gamma ** sum(step >= (round(at * total) if at < 1 else at) for at in lr_steps)
    return rate * min(1.0, (step + 1) / (warmup + 1))
