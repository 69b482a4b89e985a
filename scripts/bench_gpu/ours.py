"""This project's contenders: its training and inference steps by the fused engine and by the layers."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from bench_gpu.cases import Case
from bench_gpu.common import CLASSES, DECAY, LR, MOMENTUM, Arrays
from segnet_scratch.engine.inference import FusedInference
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.nn.autograd import Tensor, no_grad
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.segnet import SegNet, to_file_layout
from segnet_scratch.step import Replayed, TrainingStep


class Ours:
    """One engine. The layers know no bfloat16."""

    def __init__(
        self, engine: str, case: Case, device: Device, state: Mapping[str, np.ndarray], width: float = 1.0
    ) -> None:
        if engine == "layers" and case.precision == "bf16":
            raise ValueError("the layers compute in float32 or tf32")
        self.device = device
        self.model = SegNet(CLASSES, width, device, rung="tf32" if case.precision == "tf32" else None)
        self.model.load_state_dict(state)
        self._infer: Callable[[Array], object]
        if case.task == "training":
            self._step = TrainingStep(self.model, engine, case.precision, momentum=MOMENTUM, decay=DECAY)
        elif engine == "fused":
            rung = RUNG_OF_PRECISION[case.precision]
            self._infer = FusedInference(self.model.eval(), case.batch, case.size, rung)
        else:
            self.model.eval()
            self._images = device.zeros((case.batch, *case.size, 3), np.float32)
            self._replayed = Replayed(device, self._forward)
            self._infer = self._infer_by_layers

    def _forward(self) -> None:
        with no_grad():
            self.model(Tensor(self._images, self.device))

    def _infer_by_layers(self, images: Array) -> None:
        self.device.write(self._images, images)
        self._replayed()

    def call(self, images: Array, labels: Array | None) -> None:
        """A training step, or inference where there are no labels."""
        if labels is None:
            self._infer(images)
        else:
            self._step(images, labels, LR)

    def training_pass(self, images: Array, labels: Array) -> Arrays:
        """Logits and gradients, as the correctness gate compares them."""
        logits = self._step.gradients(images, labels)
        download = self.device.download
        gradients = {name: to_file_layout(download(p.grad)) for name, p in self.model.named_parameters().items()}
        return {"logits": download(logits)[..., :CLASSES].astype(np.float32), **gradients}


OURS = {"ours, fused": partial(Ours, "fused"), "ours, layers": partial(Ours, "layers")}
