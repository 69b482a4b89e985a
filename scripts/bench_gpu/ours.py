"""This project's contenders: the fused engine, and the layers as one CUDA graph."""

from collections.abc import Callable, Mapping

import numpy as np
from bench_vs_torch import CLASSES, DECAY, LR, MOMENTUM, Arrays

from bench_gpu.cases import Case
from segnet_scratch.engine.inference import FusedInference
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.engine.training import FusedTraining
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.nn.autograd import Tensor, no_grad
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.segnet import SegNet, to_file_layout


class Fused:
    """The fused engine."""

    def __init__(self, case: Case, device: Device, state: Mapping[str, np.ndarray], width: float = 1.0) -> None:
        self.device = device
        self.model = SegNet(CLASSES, width, device)
        self.model.load_state_dict(state)
        rung = RUNG_OF_PRECISION[case.precision]
        if case.task == "inference":
            self.infer = FusedInference(self.model.eval(), case.batch, case.size, rung)
            return
        weights = WorkingWeights(self.model, rung)
        self.optimiser = SGD(self.model, MOMENTUM, DECAY, working=weights)
        self.optimiser.set_rate(LR)
        self.engine = FusedTraining(self.model, case.batch, case.size, weights)
        self._replay: Callable[[], None] | None = None

    def call(self, images: Array, labels: Array | None) -> None:
        """A training step, or inference where there are no labels."""
        if labels is None:
            self.infer(images)
            return
        if self._replay is None:
            self.engine(images, labels)
            self.optimiser.update()
            self._replay = self.device.capture(self._whole_step)
        else:
            self.engine.write(images, labels)
            self._replay()

    def _whole_step(self) -> None:
        """Forward, loss, backward, update: one graph."""
        self.engine.run()
        self.optimiser.update()

    def training_pass(self, images: Array, labels: Array) -> Arrays:
        """Logits and gradients, as the correctness gate compares them."""
        self.engine(images, labels)
        download = self.device.download
        gradients = {name: to_file_layout(download(p.grad)) for name, p in self.model.named_parameters().items()}
        logits = download(self.engine.logits)[..., :CLASSES].astype(np.float32)
        return {"logits": logits, **gradients}


class Layers:
    """The layers, replayed as one graph. They know no bfloat16."""

    def __init__(self, case: Case, device: Device, state: Mapping[str, np.ndarray], width: float = 1.0) -> None:
        if case.precision == "bf16":
            raise ValueError("the layers compute in float32 or tf32")
        self.device = device
        self.model = SegNet(CLASSES, width, device, rung="tf32" if case.precision == "tf32" else None)
        self.model.load_state_dict(state)
        self.model.train(case.task == "training")
        self.optimiser = SGD(self.model, MOMENTUM, DECAY)
        self.optimiser.set_rate(LR)
        self.images = device.zeros((case.batch, *case.size, 3), np.float32)
        self.labels = device.zeros((case.batch, *case.size), np.uint8)
        self._replay: Callable[[], object] | None = None

    def _step(self) -> Tensor:
        if not self.model.training:
            with no_grad():
                return self.model(Tensor(self.images, self.device))
        self.model.zero_grad()
        logits = self.model(Tensor(self.images, self.device))
        cross_entropy(logits, self.labels).backward()
        return logits

    def _whole_step(self) -> None:
        self._step()
        if self.model.training:
            self.optimiser.update()

    def call(self, images: Array, labels: Array | None) -> None:
        """A training step, or inference where there are no labels."""
        self.device.write(self.images, images)
        if labels is not None:
            self.device.write(self.labels, labels)
        if self._replay is None:
            self._whole_step()
            self._replay = self.device.capture(self._whole_step)
        else:
            self._replay()

    def training_pass(self, images: Array, labels: Array) -> Arrays:
        """Logits and gradients, as the correctness gate compares them."""
        self.device.write(self.images, images)
        self.device.write(self.labels, labels)
        logits = self._step().numpy()
        download = self.device.download
        gradients = {name: to_file_layout(download(p.grad)) for name, p in self.model.named_parameters().items()}
        return {"logits": logits, **gradients}


OURS = {"ours, fused": Fused, "ours, layers": Layers}
