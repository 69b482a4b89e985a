"""The standard step: SegNet on random images, one training step or one inference, the same every time."""

from dataclasses import dataclass

import numpy as np

from segnet_scratch.engine.inference import FusedInference
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.lab.profile.counting import CountingDevice
from segnet_scratch.lab.profile.record import Recorder
from segnet_scratch.nn.autograd import Tensor, no_grad
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.observe import observe
from segnet_scratch.segnet import ARCHITECTURES
from segnet_scratch.step import TrainingStep

CLASSES = 21  # VOC's
# (batch, size, passes) unless given: what each device does in seconds, and what GPUs are compared by.
DEFAULTS = {"cuda": (16, 224, 20), "numpy": (1, 224, 5), "host": (1, 32, 2), "counting": (16, 224, 1)}


@dataclass(frozen=True)
class Work:
    """Which network is profiled, and on what."""

    model: str = "segnet"
    decoder: str = "indices"
    width: float = 1.0
    batch: int = 1
    size: tuple[int, int] = (224, 224)
    inference: bool = False  # forward in evaluation mode, else a training step
    engine: str = "layers"
    precision: str = "float32"  # of the fused engine

    def __str__(self) -> str:
        kind = "inference" if self.inference else "training step"
        height, width = self.size
        what = f"{kind} of {self.model}, decoder {self.decoder}, width {self.width:g}"
        if self.engine == "fused":
            what += f", fused engine in {self.precision}"
        return f"{what}, {self.batch} image{'s' if self.batch > 1 else ''} of {height}x{width}"


class Step:
    """One step, ready to be made again and again."""

    def __init__(self, work: Work, device: Device) -> None:
        self.work, self.device = work, device
        rng = np.random.default_rng(0)
        self.model = ARCHITECTURES[work.model](CLASSES, work.width, device, decoder=work.decoder)
        self.model.train(not work.inference)
        self.parameters = sum(p.data.size for p in self.model.parameters())
        shape = (work.batch, *work.size)
        images = rng.standard_normal((*shape, 3)).astype(np.float32)
        labels = rng.integers(0, CLASSES, shape).astype(np.uint8)
        self._training: TrainingStep | None = None
        self._fused: FusedInference | None = None
        if not work.inference:
            self._training = TrainingStep(self.model, work.engine, work.precision)
            self._training.write(images, labels, 1e-3)
            return
        self._images = Tensor(device.upload(images), device)
        if work.engine == "fused":
            rung = RUNG_OF_PRECISION[work.precision]
            self._fused = FusedInference(self.model, work.batch, work.size, rung)

    def run(self, recorder: Recorder) -> None:
        """Makes the step under the eyes of a recorder."""
        recorder.begin_pass()
        with observe(recorder):
            if self._training is not None:
                self._training.walk(recorder.enter)
            elif self._fused is not None:
                self._fused.run(recorder.enter)
            else:
                recorder.enter("forward")
                with no_grad():
                    self.model(self._images)


def count(work: Work) -> tuple[Recorder, dict[str, int], int]:
    """(recorder, bytes of memory by what for, number of parameters) of a step that is planned and not computed."""
    device = CountingDevice()
    step, recorder = Step(work, device), _Watcher(device)
    before = device.live
    step.run(recorder)
    memory = {"weights, momenta and batch": before}
    if recorder.at_backward:
        memory["kept for backward"] = recorder.at_backward - before
    return recorder, {**memory, "peak": device.peak}, step.parameters


class _Watcher(Recorder):
    """Also notes what is alive when backward begins."""

    def __init__(self, device: CountingDevice) -> None:
        super().__init__()
        self._device, self.at_backward = device, 0

    def enter(self, phase: str) -> None:
        super().enter(phase)
        if phase == "backward":
            self.at_backward = self._device.live
