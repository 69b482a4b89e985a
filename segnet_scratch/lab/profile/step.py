"""The standard step: SegNet on random images, one training step or one inference, the same every time."""

from dataclasses import dataclass

import numpy as np

from segnet_scratch.engine.inference import FusedInference
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.engine.training import FusedTraining
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.lab.profile.counting import CountingDevice
from segnet_scratch.lab.profile.record import Recorder
from segnet_scratch.nn.autograd import Tensor, no_grad
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.observe import carry_out, observe, scope
from segnet_scratch.segnet import ARCHITECTURES

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


@dataclass(frozen=True)
class _Update:
    """The optimiser's step as an op: per parameter three arrays are read, two of them written back, and copies."""

    parameters: int
    itemsize: int
    copies: int  # bytes of them
    name: str = "sgd_step"

    @property
    def flops(self) -> int:
        return 6 * self.parameters

    @property
    def bytes(self) -> int:
        return 5 * self.parameters * self.itemsize + self.copies


class Step:
    """One step, ready to be made again and again."""

    def __init__(self, work: Work, device: Device) -> None:
        self.work, self.device = work, device
        rng = np.random.default_rng(0)
        self.model = ARCHITECTURES[work.model](CLASSES, work.width, device, decoder=work.decoder)
        self.model.train(not work.inference)
        self.parameters = sum(p.data.size for p in self.model.parameters())
        shape = (work.batch, *work.size)
        self.images = Tensor(device.upload(rng.standard_normal((*shape, 3)).astype(np.float32)), device)
        self.labels = device.upload(rng.integers(0, CLASSES, shape).astype(np.uint8))
        self._fused: FusedTraining | FusedInference | None = None
        working = None
        if work.engine == "fused":
            working = None if work.inference else WorkingWeights.of(self.model, work.precision)
        self.optimiser = None if work.inference else SGD(self.model, working=working)
        if working is not None:
            self._fused = FusedTraining(self.model, work.batch, work.size, working)
            self._fused(self.images.data, self.labels)
        elif work.engine == "fused":
            rung = RUNG_OF_PRECISION[work.precision]
            self._fused = FusedInference(self.model, work.batch, work.size, rung)
        copies = 0 if working is None else self.parameters * 2 * working.storage.itemsize
        self._update = _Update(self.parameters, self.model.dtype.itemsize, copies)

    def run(self, recorder: Recorder) -> None:
        """Makes the step under the eyes of a recorder."""
        recorder.begin_pass()
        with observe(recorder):
            if self._fused is not None:
                self._fused.run(recorder.enter)
            else:
                self._run_layers(recorder)
            if self.optimiser is None:
                return
            recorder.enter("update")
            optimiser = self.optimiser
            with scope("update"):
                carry_out(self._update, lambda: optimiser.step(1e-3))

    def _run_layers(self, recorder: Recorder) -> None:
        recorder.enter("forward")
        if self.optimiser is None:
            with no_grad():
                self.model(self.images)
            return
        self.model.zero_grad()
        loss = self._loss()
        recorder.enter("backward")
        loss.backward()

    def _loss(self) -> Tensor:
        logits = self.model(self.images)
        with scope("loss"):
            return cross_entropy(logits, self.labels)


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
