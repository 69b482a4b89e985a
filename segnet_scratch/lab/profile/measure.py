"""The measurement itself: of a standard step, SegNet on random images, or of one op of the table.

Warm up, count, time several passes, measure ceilings, compile for figures. Or count alone, on a device that allocates
and launches without computing: a step's work and memory, at any size, in a moment.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import require
from segnet_scratch.inference_step import InferenceStep
from segnet_scratch.lab.profile import ladder
from segnet_scratch.lab.profile.ceilings import measure as measure_ceilings
from segnet_scratch.lab.profile.kernels import kernel_figures
from segnet_scratch.lab.profile.record import Profile, Recorder
from segnet_scratch.lab.profile.stopwatch import Stopwatch
from segnet_scratch.parallel import ALONE, Communicator
from segnet_scratch.runtime.devices import Array, Device, NumpyDevice
from segnet_scratch.runtime.launch import Launch
from segnet_scratch.runtime.observe import observe
from segnet_scratch.segnet import ARCHITECTURES
from segnet_scratch.step import TrainingStep

CACHE_BYTES = 256 << 20  # more than any GPU's L2 cache
DEFAULT_ARCHITECTURE = "sm_90"
Progress = Callable[[str], None]
CLASSES = 21  # VOC's
# (batch, size, passes) unless given: what each device does in seconds, and what GPUs are compared by.
DEFAULTS = {"cuda": (16, 224, 20), "numpy": (1, 224, 5), "host": (1, 32, 2), "counting": (16, 224, 1)}


@dataclass(frozen=True)
class Workload:
    """Which network is profiled, and on what."""

    model: str = "segnet"
    decoder: str = "indices"
    width: float = 1.0
    batch: int = 1
    size: tuple[int, int] = (224, 224)
    inference: bool = False  # forward in evaluation mode, else a training step
    engine: str = "layers"
    precision: str = "float32"  # of the fused engine
    ranks: Communicator = ALONE  # each with a batch of its own
    sync_bn: bool = False

    def __str__(self) -> str:
        kind = "inference" if self.inference else "training step"
        height, width = self.size
        kind += f" by {self.ranks.size} ranks" if self.ranks.size > 1 else ""
        what = f"{kind} of {self.model}, decoder {self.decoder}, width {self.width:g}"
        if self.engine == "fused":
            what += f", fused engine in {self.precision}"
        return f"{what}, {self.batch} image{'s' if self.batch > 1 else ''} of {height}x{width}"


class CountingDevice(NumpyDevice):
    """Says yes to every launch and carries none out. Arrays are address space that is never touched.

    `live` and `peak` are the bytes of arrays that ops and models hold, now and at most.
    """

    name = "counting"
    runs_kernels = True

    def __init__(self) -> None:
        self.live = self.peak = 0

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._counted(np.empty(tuple(shape), dtype))

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return self._counted(np.zeros(tuple(shape), dtype))

    def upload(self, array: np.ndarray) -> Array:
        return self._counted(np.array(array, order="C"))

    def _counted(self, array: np.ndarray) -> np.ndarray:
        nbytes = prod(array.shape) * array.itemsize
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(array, self._release, nbytes)
        return array

    def _release(self, nbytes: int) -> None:
        self.live -= nbytes

    def execute(self, launch: Launch) -> None:
        pass


class Step:
    """One step, ready to be made again and again."""

    def __init__(self, work: Workload, device: Device) -> None:
        self.work, self.device = work, device
        rng = np.random.default_rng(0)
        self.model = ARCHITECTURES[work.model](CLASSES, work.width, device, decoder=work.decoder)
        self.model.train(not work.inference)
        self.parameters = sum(p.data.size for p in self.model.parameters())
        shape = (work.batch, *work.size)
        images = rng.standard_normal((*shape, 3)).astype(np.float32)
        labels = rng.integers(0, CLASSES, shape).astype(np.uint8)
        self._step: TrainingStep | InferenceStep
        if work.inference:
            self._step = InferenceStep(self.model, work.engine, work.precision)
            self._step.write(images)
        else:
            if work.sync_bn:
                self.model.synchronise_batch_norm(work.ranks)
            self._step = TrainingStep(self.model, work.engine, work.precision, ranks=work.ranks)
            self._step.write(images, labels, 1e-3)

    def run(self, recorder: Recorder, enter: Callable[[str], None] | None = None) -> None:
        """Makes the step under the eyes of a recorder; `enter` is told of phases in its place."""
        recorder.begin_pass()
        with observe(recorder):
            self._step.run_eagerly(enter or recorder.enter)


def count(work: Workload) -> Profile:
    """Every op of a step that is planned and launched and not computed, and the memory that it would take."""
    device, recorder = CountingDevice(), Recorder()
    step, alive = Step(work, device), {}

    def enter(phase: str) -> None:
        alive[phase] = device.live
        recorder.enter(phase)

    before = device.live
    step.run(recorder, enter)
    memory = {"weights, momenta and batch": before}
    if "backward" in alive:
        memory["kept for backward"] = alive["backward"] - before
    memory["peak"] = device.peak
    return Profile(str(work), device.name, recorder.runs, parameters=step.parameters, memory=memory)


@dataclass(frozen=True)
class How:
    """How to measure. `passes` are timed, after one that is not; `progress` is told what is being done."""

    passes: int
    architectures: Sequence[str] = ()  # whose registers are shown; the GPU's own, or sm_90, unless given
    nvtx: bool = False  # a range for each op, for Nsight Systems
    progress: Progress = lambda doing: None

    def recorder(self, device: Device) -> Recorder:
        """A recorder that times on the device's clock, on a GPU each op with a cache that holds nothing of use."""
        if isinstance(device, CountingDevice):
            return Recorder()
        # Ranges are shown by Nsight Systems.
        nvtx = partial(require("nvtx", "profile", "--nvtx").annotate, domain="segnet") if self.nvtx else nullcontext
        return Recorder(stopwatch(device), nvtx)


def stopwatch(device: Device) -> Stopwatch:
    """For single ops: on a GPU each finds caches that hold nothing of use."""
    flush = partial(device.write, device.empty((CACHE_BYTES,), np.uint8), 0) if device.gpu else None
    return Stopwatch(device.timer(), flush)


def profile_step(work: Workload, device: Device, how: How, timeline: bool = False) -> Profile:
    """Every op of a step, timed. With `timeline` one more pass is made without emptying caches, and its spans kept."""
    recorder = how.recorder(device)  # first, so that a missing library shows at once
    how.progress("building the network")
    step = Step(work, device)
    how.progress("warming up")
    step.run(Recorder())
    for done in range(how.passes):
        how.progress(f"pass {done + 1} of {how.passes}")
        step.run(recorder)
    recorder.take_times()
    last = Recorder(Stopwatch(device.timer())) if timeline else Recorder()
    if timeline:
        step.run(last)
    profile = Profile(str(work), device.name, recorder.runs, parameters=step.parameters, spans=last.spans())
    return _finish(profile, device, how)


def count_step(work: Workload, how: How) -> Profile:
    """Every op of a step, planned and launched on a device that computes nothing, and what the compiler says."""
    how.progress("counting")
    return _finish(count(work), CountingDevice(), how)


def profile_op(
    op: str,
    shape: tuple[int, int, int, int],
    outputs: int | None,
    kernel: int,
    device: Device,
    how: How,
    rung: str | None = None,
) -> Profile:
    """One op of the op table in all its directions and rungs, or in one rung, on random inputs."""
    rows = ladder.rows_of(op, device, rung)
    cases = [ladder.case_of(row, shape, outputs, kernel) for row in rows]
    recorder = how.recorder(device)
    how.progress(f"{op}, {how.passes} passes")
    ladder.measure(recorder, rows, cases, device, how.passes)
    recorder.take_times()
    title = f"{op}, map {'x'.join(map(str, shape))}"
    return _finish(Profile(title, device.name, recorder.runs, spans=recorder.spans()), device, how)


def _finish(profile: Profile, device: Device, how: How) -> Profile:
    """Adds ceilings and what the compiler says."""
    if profile.total.seconds is not None:
        how.progress("measuring ceilings")
        profile.ceilings = measure_ceilings(device)
    architectures = how.architectures or (device.architecture or DEFAULT_ARCHITECTURE,)
    launches = [launch for run in profile.runs for launch in run.launches]
    profile.kernels, message = kernel_figures(
        launches, architectures, lambda done, total: how.progress(f"compiling kernels, {done} of {total}")
    )
    profile.messages += [message] if message else []
    return profile
