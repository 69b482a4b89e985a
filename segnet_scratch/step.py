"""One training step as an object, for whoever makes steps: trainer, benchmarks, profiler, proofs.

    step = TrainingStep(model, "fused", "bf16", class_weights=weights)
    step(images, labels, lr)            # waits for nothing
    loss, norm = step.read().get()      # waits for that step alone

A step is one unit: forward, loss, backward, norm of the gradients, update. The first one of each shape of batch runs op
by op, all later ones replay it as a CUDA graph where the device is a GPU. Loss and norm stay on the device; a step
whose gradients are not finite changes nothing there (optim.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic

import numpy as np

from segnet_scratch.config import AUTO, Config
from segnet_scratch.engine.network import RUNG_OF_PRECISION, check, unsupported_reason
from segnet_scratch.engine.training import FusedTraining
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.errors import ConfigError, DTypeError, ShapeError
from segnet_scratch.nn.autograd import Tensor, apply
from segnet_scratch.ops.convolution.conv2d_mma import has_tensor_cores
from segnet_scratch.ops.elementwise.arithmetic import compute
from segnet_scratch.ops.loss.cross_entropy import CrossEntropyForward, check_class_weights, check_labels
from segnet_scratch.ops.op import VOID, spec_of
from segnet_scratch.optim import SGD
from segnet_scratch.parallel import ALONE, Communicator, GradientSum
from segnet_scratch.runtime.devices import Array, Device, PendingDownload
from segnet_scratch.runtime.devices.base import Result
from segnet_scratch.runtime.observe import scope
from segnet_scratch.segnet import SegNet

OnPhase = Callable[[str], None]  # is told of the phase that begins: forward, backward, update
OnGradient = Callable[[Array], None]  # is told of a gradient that is done
Shape = tuple[int, int, int]  # of the labels of a batch
LossSettings = tuple[Array | None, str, float]  # weights of the classes, normalisation, smoothing of the labels


def ignore(what: object) -> None:
    """Nobody wants to know."""


def resolve(
    model: SegNet, engine: str, precision: str, layers_only: bool = False, training: bool = True
) -> tuple[str, str]:
    """The engine and the precision, of training or of inference, that settings with "auto" in them stand for.

    The fused engine on a GPU of sm_80 or newer, where it can compute the network, and there in bfloat16; the layers in
    float32 everywhere else. bfloat16 is the fused engine's alone, whatever the device. `layers_only` where the run
    needs what only layers can: a batch in parts, batch norm over several ranks.

    ConfigError where the fused engine is asked for and cannot compute the network.
    """
    on_gpu = model.device.architecture is not None and has_tensor_cores(model.device)
    if engine == AUTO:
        rung = RUNG_OF_PRECISION["bf16" if precision == AUTO else precision]
        fits = on_gpu and not layers_only and unsupported_reason(model, rung, training) is None
        engine = "fused" if precision == "bf16" or fits else "layers"
    if precision == AUTO:
        precision = "bf16" if engine == "fused" and on_gpu else "float32"
    if engine == "fused":
        if layers_only:
            raise ConfigError('engine = "fused": it takes a batch whole, and batch norm by rank; take the layers')
        check(model, RUNG_OF_PRECISION[precision], training)
    elif precision == "bf16":
        raise ConfigError('precision "bf16": the layers compute in float32 or tf32; take the fused engine')
    return engine, precision


class Normaliser:
    """What the loss is divided by, of the batch of all ranks: the sum of its weights, or its valid pixels."""

    def __init__(self, model: SegNet, ranks: Communicator, class_weights: Array | None, normalisation: str) -> None:
        self._device, self.ranks = model.device, ranks
        self._weights = np.zeros(VOID + 1)
        self._weights[: model.classes] = 1
        if class_weights is not None and normalisation == "weights":
            self._weights[: model.classes] = self._device.download(class_weights)

    def shares(self, labels: Array, cuts: Sequence[slice]) -> np.ndarray:
        """The shares of it, float64, that parts of this rank's labels have; those of the device are waited for."""
        found = labels if isinstance(labels, np.ndarray) else self._device.download(labels)
        counts = [np.bincount(found[cut].reshape(-1), minlength=VOID + 1) for cut in cuts]
        weights = np.array([float(self._weights @ count) for count in counts])
        # Where all is void, loss and gradients are 0 whatever they are multiplied by.
        return weights / (self.ranks.all_reduce(float(weights.sum())) or 1.0)


class LayersTraining:
    """The pass of the layers: autograd, one op after the other.

    In `parts` of the batch, one by one: their gradients add up, and so do their losses, each times its share of the
    normaliser.
    """

    def __init__(
        self, model: SegNet, parts: int, seed: int, loss: LossSettings, shape: Shape, normaliser: Normaliser
    ) -> None:
        self.model, self.device, self._ranks = model, model.device, normaliser.ranks
        self._seed, self._parts = seed, parts
        self.images, self.labels = self.device.zeros((*shape, 3), model.dtype), self.device.zeros(shape, np.uint8)
        self._loss, self._normaliser = loss, normaliser
        count = min(parts, shape[0])
        self._cuts = [slice(shape[0] * k // count, shape[0] * (k + 1) // count) for k in range(count)]
        self._whole = count == 1 and normaliser.ranks.size == 1  # the normaliser is that of the logits at hand
        self.shares = self.device.upload(np.ones(count, model.dtype))
        self.loss: Array = self.shares[:1]
        self._number = 0

    def prepare(self, number: int, labels: Array) -> None:
        """Everything else that differs from step to step, before step `number`; `labels` as they were given."""
        self._number = number
        self._draw(0)
        if not self._whole:
            self.device.write(self.shares, self._normaliser.shares(labels, self._cuts).astype(self.model.dtype))

    def _draw(self, part: int) -> None:
        """Dropout masks of its own for each part of each step on each rank."""
        number = self._number * self._parts + part
        self.model.set_random_state(self._seed, number * self._ranks.size + self._ranks.rank)

    def run(
        self, on_phase: OnPhase = ignore, logits_out: list[Array] | None = None, on_gradient: OnGradient = ignore
    ) -> None:
        """One pass over the batch, op by op. Logits (n, h, w, classes or more) are added to `logits_out`, if given.

        `on_gradient` is told of each gradient when nothing more is added to it.
        """
        self.model.zero_grad()
        for part, cut in enumerate(self._cuts):
            on_phase("forward")
            if part:
                self._draw(part)
            logits = self.model(Tensor(self.images[cut], self.device))
            with scope("loss"):
                # Not the function: it would check labels once more.
                class_weights, normalisation, smoothing = self._loss
                op = CrossEntropyForward.plan(spec_of(logits.data), normalisation, smoothing)
                loss = apply(op, logits=logits, labels=self.labels[cut], class_weights=class_weights)
            if logits_out is not None:
                logits_out.append(logits.data)
            del logits  # 21 floats a pixel: backward frees them as soon as it can
            on_phase("backward")
            share = self.shares[part : part + 1]
            loss.backward(share, on_gradient if part + 1 == len(self._cuts) else None)
            of_part = loss.data if self._whole else compute(self.device, "multiply", loss.data, share)
            self.loss = compute(self.device, "add", self.loss, of_part) if part else of_part


# Forward, loss and backward for batches of one shape; parameters have their gradients afterwards. images, labels: where
# the batch is written. loss (1): what this rank adds to that of the batch of all ranks.
Pass = LayersTraining | FusedTraining


class TrainingStep:
    """Steps of SGD of a model, computed by the `layers` or by the `fused` engine, for batches of any shape.

    `precision` is how the fused engine multiplies; layers do it as their model was built. `settings` give all else but
    the weights of the classes (empty: all 1): SGD's numbers, the loss, the parts of a batch, the seed of dropout masks.
    Each of several `ranks` takes its share of every batch, and all make the step of the whole. ConfigError where the
    fused engine cannot compute the model.
    """

    def __init__(
        self,
        model: SegNet,
        engine: str = "layers",
        precision: str = "float32",
        settings: Config | None = None,
        class_weights: Sequence[float] | np.ndarray = (),
        ranks: Communicator = ALONE,
    ) -> None:
        settings = settings or Config()
        parts, normalisation = settings.accumulate, settings.loss_normalisation
        if engine == "fused" and parts > 1:
            raise ConfigError(f"training step: the fused engine takes a batch whole, got {parts} parts; use the layers")
        self.model, self.device = model, model.device
        # The engine lays the classifier's parameters where its kernels want them: before SGD looks where they are.
        working = WorkingWeights(model, RUNG_OF_PRECISION[precision]) if engine == "fused" else None
        numbers = settings.momentum, settings.decay, settings.bias_lr, settings.clip_norm
        self.optimiser = SGD(model, *numbers, working, {"encoder": settings.encoder_lr})
        weights = None
        if len(class_weights):
            rounded = np.array(class_weights, np.float32)
            weights = self.device.upload(check_class_weights(rounded, model.classes, model.dtype))
        objective = weights, normalisation, settings.label_smoothing
        normaliser = Normaliser(model, ranks, weights, normalisation)

        def plan(shape: Shape) -> Pass:
            if working is None:
                return LayersTraining(model, parts, settings.seed, objective, shape, normaliser)
            return FusedTraining(model, working, *objective, shape, normaliser.shares if ranks.size > 1 else None)

        self._plan, self._ranks = plan, ranks
        self._sum = GradientSum(ranks, self.device, settings.gradient_sum == "bf16")
        self._captures = parts == 1 and ranks.collectives.capturable  # between parts random numbers are written
        self._passes: dict[tuple[int, ...], tuple[Pass, GraphReplay[tuple[Array, list[Array]]]]] = {}

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
            got = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
            raise ShapeError(f"training step: {got}; expected (n, h, w, 3) and (n, h, w)")
        if isinstance(labels, np.ndarray):
            labels = check_labels(labels, self.model.classes)
        if images.dtype != self.model.dtype or labels.dtype != np.uint8:
            got = f"images of {images.dtype} and labels of {labels.dtype}"
            raise DTypeError(f"training step: {got}; expected {self.model.dtype} and uint8")
        if shape not in self._passes:
            planned = self._plan((shape[0], shape[1], shape[2]))
            self._passes[shape] = planned, GraphReplay(self.device, lambda: self._unit(planned), self._captures)
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
            self._pass.loss, gradients = self._replayed()
        for parameter, gradient in zip(self.optimiser.parameters.values(), gradients, strict=True):
            parameter.grad = gradient  # a graph's own, where steps of another shape or op by op came between

    def run_eagerly(self, on_phase: OnPhase = ignore) -> None:
        """As `run`, but op by op, never as a graph, so that observers see it; `on_phase` is told of each phase."""
        with self._whole():
            self._unit(self._pass, on_phase)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        with self._ranks.together():
            try:
                yield
            except BaseException:  # the forward pass has moved running statistics
                self.optimiser.restore_statistics()
                raise

    def _unit(self, current: Pass, on_phase: OnPhase = ignore) -> tuple[Array, list[Array]]:
        """A step; the loss and the gradients that it leaves, those of the batch of all ranks."""
        current.run(on_phase, on_gradient=self._sum.add)
        self._sum.finish(current.loss)
        on_phase("update")
        self.optimiser.update()
        return current.loss, [parameter.grad for parameter in self.optimiser.parameters.values()]

    def gradients(self, images: Array, labels: Array, number: int = 0) -> Array:
        """Loss and gradients of a batch alone; nothing moves.

        Returns the logits, with the classes in their first channels; in parts those of the last one.
        """
        self.write(images, labels, 0.0, number)
        self.model.train()
        logits: list[Array] = []
        try:
            self._pass.run(logits_out=logits)
        finally:
            self.optimiser.restore_statistics()
        return logits[-1]

    def read(self) -> "Outcome":
        """Loss and norm of the step just made, on their way to the host while the device goes on.

        After `gradients` there is no such step: the norm is still that of the last one.
        """
        return Outcome(self.device.download_async([self._pass.loss, self.optimiser.norm]))


class Outcome:
    """Loss and norm of the gradients of one step."""

    def __init__(self, download: PendingDownload) -> None:
        self._download = download

    @property
    def ready(self) -> bool:
        """Has the step been made?"""
        return self._download.ready

    def get(self) -> tuple[float, float]:
        """(loss, norm); waits until the step has been made."""
        loss, norm = (float(array[0]) for array in self._download.get())
        return loss, norm


class GraphReplay(Generic[Result]):
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
