"""The measurement itself: warm up, count, time several passes, measure ceilings, compile for figures."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from segnet_scratch.extras import require
from segnet_scratch.lab.profile import ladder
from segnet_scratch.lab.profile.ceilings import measure as measure_ceilings
from segnet_scratch.lab.profile.counting import CountingDevice
from segnet_scratch.lab.profile.kernels import kernel_figures
from segnet_scratch.lab.profile.record import RangeOf, Recorder
from segnet_scratch.lab.profile.step import Step, Work, count
from segnet_scratch.lab.profile.summary import Profile
from segnet_scratch.runtime.devices import Device

CACHE_BYTES = 256 << 20  # more than any GPU's second-level cache
DEFAULT_ARCHITECTURE = "sm_90"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class How:
    """How to measure. `passes` are timed, after one that is not; `progress` is told what is being done."""

    passes: int
    architectures: Sequence[str] = ()  # whose registers are shown; the GPU's own, or sm_90, unless given
    nvtx: bool = False  # a range for each op, for Nsight Systems
    progress: Progress = lambda doing: None

    def recorder(self, device: Device) -> Recorder:
        """A recorder that times on the device's clock, on a GPU each op with a cache that holds nothing of use."""
        scratch = device.empty((CACHE_BYTES,), np.uint8) if device.name == "cuda" else None

        def before() -> None:
            if scratch is not None:
                device.write(scratch, 0)

        return Recorder(device.timer(), before, nvtx_ranges() if self.nvtx else _no_range)


def _no_range(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def nvtx_ranges() -> RangeOf:
    """Ranges that Nsight Systems shows; MissingLibraryError without the package nvtx."""
    annotate = require("nvtx", "profile", "--nvtx").annotate
    return lambda name: annotate(name, domain="segnet")


def profile_step(work: Work, device: Device, how: How, timeline: bool = False) -> Profile:
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
    spans = []
    if timeline:
        last = Recorder(device.timer())
        step.run(last)
        spans = last.spans()
    profile = Profile(str(work), device.name, recorder.runs, parameters=step.parameters, spans=spans)
    return _finish(profile, device, how)


def count_step(work: Work, how: How) -> Profile:
    """Every op of a step, planned and launched on a device that computes nothing, and the memory that it would take."""
    how.progress("counting")
    recorder, memory, parameters = count(work)
    device = CountingDevice()
    profile = Profile(str(work), device.name, recorder.runs, parameters=parameters, memory=memory)
    return _finish(profile, device, how)


def profile_op(
    op: str, shape: tuple[int, int, int, int], outputs: int | None, kernel: int, device: Device, how: How
) -> Profile:
    """One op of the op table in all its directions and rungs, on random inputs."""
    rows = ladder.rows_of(op, device)
    cases = [ladder.case_of(row, shape, outputs, kernel) for row in rows]
    recorder = Recorder() if isinstance(device, CountingDevice) else how.recorder(device)
    how.progress(f"{op}, {how.passes} passes")
    ladder.measure(recorder, rows, cases, device, how.passes)
    spans = []
    if not isinstance(device, CountingDevice):
        recorder.take_times()
        spans = recorder.spans()
    title = f"{op}, map {'x'.join(map(str, shape))}"
    return _finish(Profile(title, device.name, recorder.runs, spans=spans), device, how)


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
