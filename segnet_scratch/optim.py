"""SGD with momentum over a model's parameters, and learning-rate schedules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np

from segnet_scratch.config import Config
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.errors import CheckpointError, ConfigError, TrainingError
from segnet_scratch.ops.convolution.split_planes import PLANES
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.ops.optimiser.array_table import columns
from segnet_scratch.ops.optimiser.gradient_norm import GradientNorm
from segnet_scratch.ops.optimiser.sgd import KeepFinite, SgdStep
from segnet_scratch.ops.optimiser.sgd_pack import SgdPackStep
from segnet_scratch.runtime.devices import Array
from segnet_scratch.runtime.observe import carry_out, scope
from segnet_scratch.segnet import SegNet, from_file_layout, to_file_layout


@dataclass(frozen=True)
class Update:
    """The optimiser's work for whoever watches it: a norm of the gradients, a step, and copies."""

    flops: int
    bytes: int
    name: str = "sgd_step"


class SGD:
    """m = momentum m + scale g + decay w; w = w - lr m, for every parameter of a model, in one launch.

    Biases and batch-norm parameters do not decay. Their learning rate is `bias_lr` times that of the weights (the
    authors' Caffe models use 2). Where all gradients together are longer than `clip_norm`, `scale` makes them that
    long; else, and without `clip_norm` (0), it is 1. `working` are the fused engine's weights, kept up to date.
    `multipliers` change the learning rate of a part of the network, by the prefix of its parameters' names ("encoder",
    "encoder.1"), the longest one that fits; 0 freezes the part. Running statistics of batch norm still follow the data.
    ConfigError for a prefix that no parameter has, and for a factor that is no number of at least 0.

    A step whose gradients are not finite leaves no trace, and neither does any step after it, until a state is loaded:
    parameters, momenta and the model's running statistics stay what they were. `norm` says so, whenever it is read.
    """

    def __init__(
        self,
        model: SegNet,
        momentum: float = 0.9,
        decay: float = 5e-4,
        bias_lr: float = 1.0,
        clip_norm: float = 0.0,
        working: WorkingWeights | None = None,
        multipliers: Mapping[str, float] | None = None,
    ) -> None:
        if model.folded:
            raise TrainingError("sgd: batch norm is folded into this network, which leaves nothing to train")
        self.model, self.clip_norm = model, clip_norm
        self.parameters = model.named_parameters()
        device = model.device
        self.momenta = {name: device.zeros(p.shape, p.dtype) for name, p in self.parameters.items()}
        self._lr = device.zeros((1,), np.float64)
        arrays = [p.data for p in self.parameters.values()]
        shapes = [p.shape for p in self.parameters.values()]
        factors = _factors(list(self.parameters), multipliers or {})
        rates = [f * (1.0 if len(shape) == 4 else bias_lr) for f, shape in zip(factors, shapes, strict=True)]
        decays = [decay if len(shape) == 4 else 0.0 for shape in shapes]
        self._moved = columns(parameter=arrays, momentum=self.momenta.values())
        self._step: Op = SgdStep(shapes, rates, decays, momentum, model.dtype)
        self._copy: Op | None = None
        if working is not None:
            copies, flipped = ([of.get(name) for name in self.parameters] for of in (working.copies, working.flipped))
            self._moved |= columns(copy=copies, flipped=flipped)
            of_copies, of_flipped = ([getattr(a, "shape", None) for a in arrays] for arrays in (copies, flipped))
            as_kept = of_copies, of_flipped, working.storage, PLANES[working.rung]
            plan = partial(SgdPackStep, shapes, rates, decays, momentum, *as_kept)
            self._step, self._copy = plan(), plan(update=False)
        buffers = [buffer.data for buffer in model.named_buffers().values()]
        self._statistics = columns(array=buffers, kept=[device.copy(array) for array in buffers])
        self._keep = KeepFinite([array.shape for array in buffers], model.dtype)
        self._scale = device.upload(np.ones(1))
        self._failed = device.upload(np.full(1, np.nan))  # here already where memory has run out
        self._norm = GradientNorm(shapes, clip_norm or inf, model.dtype)
        made = {**self._norm.outputs, **self._norm.workspace}
        self._of_norm = {"scale": self._scale, **{name: device.zeros(s.shape, s.dtype) for name, s in made.items()}}
        self.norm = self._of_norm["norm"]  # of all gradients together, before clipping
        held = [] if working is None else [*working.copies.values(), *working.flipped.values()]
        # The gradients are read twice; weights and momenta are read and written.
        moved = 6 * sum(array.nbytes for array in arrays) + sum(array.nbytes for array in held)
        self._work = Update(8 * sum(array.size for array in arrays), moved)
        self.refresh()

    def refresh(self) -> None:
        """To be called after somebody else has changed weights or running statistics: what is kept of them follows."""
        self.model.device.write(self._scale, np.ones(1))
        self._keep_finite(self._scale)
        if self._copy is not None:
            self._copy.run(self.model.device, Buffers(**self._moved, lr=self._lr, scale=self._scale))

    def restore_statistics(self) -> None:
        """The running statistics are again what the last whole step left: a forward pass is not to count."""
        self._keep_finite(self._failed)

    def _keep_finite(self, scale: Array) -> None:
        self._keep.run(self.model.device, Buffers(**self._statistics, scale=scale))

    def step(self, lr: float) -> None:
        """Moves every parameter along its gradient; all must have one."""
        self.set_rate(lr)
        self.update()

    def set_rate(self, lr: float) -> None:
        """The first half of `step`: the learning rate, which lies on the device."""
        self.model.device.write(self._lr, np.array([lr]))

    def update(self) -> None:
        """The second half of `step`: what `device.capture` can record."""
        with scope("update"):
            carry_out(self._work, self._update)

    def _update(self) -> None:
        if missing := [name for name, parameter in self.parameters.items() if parameter.grad is None]:
            raise TrainingError(f"sgd: {missing[0]} has no gradient; call loss.backward() before step()")
        device = self.model.device
        gradients = columns(gradient=[parameter.grad for parameter in self.parameters.values()])
        self._norm.run(device, Buffers(**gradients, **self._of_norm))
        self._keep_finite(self._scale)
        self._step.run(device, Buffers(**self._moved, **gradients, lr=self._lr, scale=self._scale))

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
        self.refresh()


def learning_rate(step: int, total: int, settings: Config) -> float:
    """The learning rate of step 0, 1, ... total - 1.

    The schedule "constant" stays at `lr`; "poly" falls as lr (1 - step / total)^poly_power (DeepLab, arXiv 1606.00915);
    "step" is multiplied by `lr_gamma` at each of `lr_steps`, which are steps, or below 1 shares of `total`. The first
    `warmup` steps rise linearly to the schedule.
    """
    rate = settings.lr
    if settings.schedule == "poly":
        rate *= (1 - step / total) ** settings.poly_power
    elif settings.schedule == "step":
        rate *= settings.lr_gamma ** sum(step >= (round(at * total) if at < 1 else at) for at in settings.lr_steps)
    return rate * min(1.0, (step + 1) / (settings.warmup + 1))


def _factors(names: Sequence[str], multipliers: Mapping[str, float]) -> list[float]:
    """The multiplier of each name: that of the longest prefix, up to a dot, which has one; else 1."""

    def fits(name: str, prefix: str) -> bool:
        return f"{name}.".startswith(f"{prefix}.")

    for prefix, factor in multipliers.items():
        if not 0 <= factor < inf:
            raise ConfigError(f"multipliers: {prefix} has {factor}; expected a number of at least 0")
        if not any(fits(name, prefix) for name in names):
            raise ConfigError(f"multipliers: no parameter begins with {prefix!r}; expected a part such as 'encoder.1'")
    ordered = sorted(multipliers.items(), key=lambda item: -len(item[0]))
    return [next((factor for prefix, factor in ordered if fits(name, prefix)), 1.0) for name in names]
