"""One training step as an object, for whoever makes steps: trainer, benchmarks, profiler, proofs.

    step = TrainingStep(model, "fused", "bf16", class_weights=weights)
    step(images, labels, lr)            # waits for nothing
    loss, norm = step.read().get()      # waits for that step alone

A step is one unit: forward, loss, backward, norm of the gradients, update. The first one of each shape of batch runs op
by op, all later ones replay it as a CUDA graph where the device is a GPU. Loss and norm stay on the device; a step
whose gradients are not finite changes nothing there (optim.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol

import numpy as np

from segnet_scratch.config import AUTO
from segnet_scratch.data.palette import VOID
from segnet_scratch.engine.network import RUNG_OF_PRECISION, check, misfit
from segnet_scratch.engine.training import FusedTraining
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.errors import ConfigError, DTypeError, ShapeError
from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.nn.functions import CrossEntropy
from segnet_scratch.ops.convolution.conv2d_mma import has_tensor_cores
from segnet_scratch.ops.loss.cross_entropy import check_class_weights, check_labels
from segnet_scratch.optim import SGD
from segnet_scratch.runtime.devices import Array, Device, Reading
from segnet_scratch.runtime.devices.base import Result
from segnet_scratch.runtime.observe import scope
from segnet_scratch.segnet import SegNet

Enter = Callable[[str], None]  # is told of the phase that begins: forward, backward, update


def nobody(phase: str) -> None:
    """Nobody wants to know."""


def resolve(model: SegNet, engine: str, precision: str, parts: int = 1, training: bool = True) -> tuple[str, str]:
    """The engine and the precision, of training or of inference, that settings with "auto" in them stand for.

    The fused engine on a GPU of sm_80 or newer, where it can compute the network, and there in bfloat16; the layers in
    float32 everywhere else. bfloat16 is the fused engine's alone, whatever the device.

    ConfigError where the fused engine is asked for and cannot compute the network.
    """
    on_gpu = model.device.architecture is not None and has_tensor_cores(model.device)
    if engine == AUTO:
        rung = RUNG_OF_PRECISION["bf16" if precision == AUTO else precision]
        fits = on_gpu and parts == 1 and misfit(model, rung, training) is None
        engine = "fused" if precision == "bf16" or fits else "layers"
    if precision == AUTO:
        precision = "bf16" if engine == "fused" and on_gpu else "float32"
    if engine == "fused":
        check(model, RUNG_OF_PRECISION[precision], training)
    elif precision == "bf16":
        raise ConfigError('precision "bf16": the layers compute in float32 or tf32; take the fused engine')
    return engine, precision


class Pass(Protocol):
    """Forward, loss and backward for batches of one shape; parameters have their gradients afterwards.

    images, labels: where the batch is written. losses: those of its parts, each to be multiplied by its share.
    """

    images: Array
    labels: Array
    shares: list[float]
    losses: list[Array]

    def prepare(self, number: int, labels: Array) -> None:
        """Everything else that differs from step to step, before step `number`; `labels` as they were given."""

    def run(self, enter: Enter = nobody, hold: list[Array] | None = None) -> None:
        """One pass over the batch, op by op; where asked it holds on to logits (n, h, w, classes or more)."""


class LayersTraining:
    """The pass of the layers: autograd, one op after the other.

    In `parts` of the batch, one by one: their gradients add up, and the loss is the mean of the parts' losses, each
    weighed by its share of the normaliser.
    """

    def __init__(
        self,
        model: SegNet,
        parts: int,
        seed: int,
        class_weights: Array | None,
        normalisation: str,
        smoothing: float,
        shape: tuple[int, int, int],
    ) -> None:
        self.model, self.device, self._seed, self._parts = model, model.device, seed, parts
        self.images, self.labels = self.device.zeros((*shape, 3), model.dtype), self.device.zeros(shape, np.uint8)
        self._objective = class_weights, normalisation, smoothing
        self._weights = np.ones(model.classes)  # of each class in the loss's normaliser
        if class_weights is not None and normalisation == "weights":
            self._weights = self.device.download(class_weights).astype(np.float64)
        count = min(parts, shape[0])
        self.losses: list[Array] = []
        self._cuts = [slice(shape[0] * k // count, shape[0] * (k + 1) // count) for k in range(count)]
        self.shares = [1.0]
        self._number = 0
        self._ones = self.device.upload(np.ones(1, model.dtype))

    def prepare(self, number: int, labels: Array) -> None:
        self._number = number
        self._draw(0)
        if len(self._cuts) > 1:  # on a GPU labels of the CPU are counted there, those of the device are waited for
            self.shares = self._weigh(labels if isinstance(labels, np.ndarray) else self.device.download(labels))

    def _draw(self, part: int) -> None:
        """Dropout masks of its own for each part of each step."""
        self.model.set_random_state(self._seed, self._number * self._parts + part)

    def _weigh(self, labels: np.ndarray) -> list[float]:
        """The share of the loss's normaliser that each part has."""
        weighs = [float(self._weights[part[part != VOID]].sum()) for part in (labels[cut] for cut in self._cuts)]
        whole = sum(weighs) or 1.0  # where all is void, loss and gradients are 0 whatever they are multiplied by
        return [weight / whole for weight in weighs]

    def run(self, enter: Enter = nobody, hold: list[Array] | None = None) -> None:
        self.model.zero_grad()
        self.losses = []
        for part, cut in enumerate(self._cuts):
            enter("forward")
            if part:
                self._draw(part)
            logits = self.model(Tensor(self.images[cut], self.device))
            with scope("loss"):
                # Not the function: it would check labels once more.
                loss = CrossEntropy.of(logits, self.labels[cut], *self._objective)
            if hold is not None:
                hold.append(logits.data)
            del logits  # 21 floats a pixel: backward frees them as soon as it can
            enter("backward")
            share = self._ones
            if len(self._cuts) > 1:
                share = self.device.upload(np.array([self.shares[part]], loss.dtype))
            loss.backward(share)
            self.losses.append(loss.data)


class TrainingStep:
    """Steps of SGD of a model, computed by the `layers` or by the `fused` engine, for batches of any shape.

    `precision` is how the fused engine multiplies; layers do it as their model was built. `parts` and `seed` (of
    dropout masks) belong to the layers. ConfigError where the fused engine cannot compute the model.
    """

    def __init__(
        self,
        model: SegNet,
        engine: str = "layers",
        precision: str = "float32",
        *,
        momentum: float = 0.9,
        decay: float = 5e-4,
        bias_lr: float = 1.0,
        multipliers: Mapping[str, float] | None = None,
        clip_norm: float = 0.0,
        class_weights: np.ndarray | None = None,
        normalisation: str = "weights",
        smoothing: float = 0.0,
        parts: int = 1,
        seed: int = 0,
    ) -> None:
        if engine == "fused" and parts > 1:
            raise ConfigError(f"training step: the fused engine takes a batch whole, got {parts} parts; use the layers")
        self.model, self.device = model, model.device
        # The engine lays the classifier's parameters where its kernels want them: before SGD looks where they are.
        working = WorkingWeights.of(model, precision) if engine == "fused" else None
        self.optimiser = SGD(model, momentum, decay, bias_lr, clip_norm, working, multipliers)
        weights = None if class_weights is None else self._checked(class_weights)
        objective = weights, normalisation, smoothing

        def plan(shape: tuple[int, int, int]) -> Pass:
            if working is not None:
                return FusedTraining(model, working, *objective, shape)
            return LayersTraining(model, parts, seed, *objective, shape)

        self._plan, self._captures = plan, parts == 1  # between parts random numbers are written
        self._passes: dict[tuple[int, ...], tuple[Pass, Replayed[tuple[list[Array], list[Array]]]]] = {}

    def _checked(self, class_weights: np.ndarray) -> Array:
        return self.device.upload(check_class_weights(class_weights, self.model.classes, self.model.dtype))

    def __call__(self, images: Array, labels: Array, lr: float, number: int = 0) -> None:
        """One step on a batch; waits for nothing. Gradients and losses are there until the next one.

        images (n, h, w, 3), labels (n, h, w) uint8, of the CPU or of the device; `number` of the step from 0 on, for
        dropout.
        """
        self.write(images, labels, lr, number)
        self.run()

    def write(self, images: Array, labels: Array, lr: float, number: int = 0) -> None:
        """Everything that differs from step to step: what `run` works on."""
        shape = tuple(images.shape[:3])
        if tuple(images.shape) != (*shape, 3) or tuple(labels.shape) != shape:
            raise ShapeError(
                f"training step: images {tuple(images.shape)} and labels {tuple(labels.shape)}; expected (n, h, w, 3) "
                "and (n, h, w)"
            )
        if isinstance(labels, np.ndarray):
            labels = check_labels(labels, self.model.classes)
        if images.dtype != self.model.dtype or labels.dtype != np.uint8:
            raise DTypeError(
                f"training step: images of {images.dtype} and labels of {labels.dtype}; expected {self.model.dtype} "
                "and uint8"
            )
        if shape not in self._passes:
            planned = self._plan((shape[0], shape[1], shape[2]))
            self._passes[shape] = planned, Replayed(self.device, lambda: self._unit(planned), self._captures)
        self._pass, self._replayed = self._passes[shape]
        self.device.write(self._pass.images, images)
        self.device.write(self._pass.labels, labels)
        self._pass.prepare(number, labels)
        self.optimiser.set_rate(lr)

    def run(self) -> None:
        """One step on what was written. One that fails halfway, for lack of memory, leaves no trace either."""
        if not self.model.training:
            self.model.train()
        with self._whole():
            self._pass.losses, gradients = self._replayed()
        for parameter, gradient in zip(self.optimiser.parameters.values(), gradients, strict=True):
            parameter.grad = gradient  # a graph's own, where steps of another shape or op by op came between

    def walk(self, enter: Enter = nobody) -> None:
        """The same op by op, for whoever watches; `enter` is told of forward, backward and update."""
        with self._whole():
            self._unit(self._pass, enter)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # the forward pass has moved running statistics
            self.optimiser.take_back()
            raise

    def _unit(self, current: Pass, enter: Enter = nobody) -> tuple[list[Array], list[Array]]:
        """A step; the losses and gradients that it leaves."""
        current.run(enter)
        enter("update")
        self.optimiser.update()
        return current.losses, [parameter.grad for parameter in self.optimiser.parameters.values()]

    def gradients(self, images: Array, labels: Array, number: int = 0) -> Array:
        """Loss and gradients of a batch alone; nothing moves.

        Returns the logits, with the classes in their first channels; in parts those of the last one.
        """
        self.write(images, labels, 0.0, number)
        self.model.train()
        logits: list[Array] = []
        try:
            self._pass.run(hold=logits)
        finally:
            self.optimiser.take_back()
        return logits[-1]

    def read(self) -> "Outcome":
        """Loss and norm of the step just made, on their way to the host while the device goes on.

        After `gradients` there is no such step: the norm is still that of the last one.
        """
        return Outcome(self.device.read([*self._pass.losses, self.optimiser.norm]), self._pass.shares)


class Outcome:
    """Loss and norm of the gradients of one step."""

    def __init__(self, reading: Reading, shares: Sequence[float]) -> None:
        self._reading, self._shares = reading, shares

    @property
    def ready(self) -> bool:
        """Has the step been made?"""
        return self._reading.ready

    def get(self) -> tuple[float, float]:
        """(loss, norm); waits until the step has been made."""
        *losses, norm = (float(array[0]) for array in self._reading.get())
        return math.fsum(share * loss for share, loss in zip(self._shares, losses, strict=True)), norm


class Replayed(Generic[Result]):
    """A function that launches kernels: carried out as it is the first time, from then on replayed as a GPU's graph.

    Arrays that the function makes are those of the graph from the second time on; what it returns says which.
    """

    def __init__(self, device: Device, function: Callable[[], Result], capture: bool = True) -> None:
        self._device, self._function, self._capture = device, function, capture
        self._replay: Callable[[], Result] | None = None
        self._loaded = False

    def __call__(self) -> Result:
        if self._replay is None and self._loaded and self._capture:
            self._replay = self._device.capture(self._function)
        if self._replay is not None:
            return self._replay()
        result = self._function()  # loads the kernels, which a graph cannot
        self._loaded = True
        return result
