"""Carries out a launch: on the host device in a process of its own, on a GPU as it is.

A kernel that writes far outside its arrays ends the process that it runs in, and one that never ends cannot be
interrupted from Python. So the host device's runs happen in a forked child; arrays lie in memory that both see.
"""

import ctypes
import faulthandler
import json
import mmap
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from segnet_scratch import errors
from segnet_scratch.errors import ConfigError, SegnetError
from segnet_scratch.lab.workbench.guards import FIRST, Fill, bits, place
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.runtime.devices import Array, Device, HostDevice, NumpyDevice
from segnet_scratch.runtime.host import HostOptions, prepare
from segnet_scratch.runtime.launch import launch

ASCENDING = HostOptions(workers=1)  # one thread of the operating system: the same order of blocks every time


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    arrays: dict[str, np.ndarray | None]
    damage: list[str]  # writes outside the arrays
    seconds: float
    fault: str | None  # why the run did not finish

    def array(self, name: str) -> np.ndarray:
        """The elements of an array that is no null pointer, in one dimension."""
        array = self.arrays[name]
        assert array is not None
        return array.reshape(-1)

    def unlike(self, other: "Outcome", name: str) -> np.ndarray:
        """Which elements of an array have other bits than after another run."""
        return bits(self.array(name)) != bits(other.array(name))


_NO_MORE = "This process cannot use the GPU any more"
_NAMES_THE_LINE = "--sanitize (sanitize=True) names the line"
_STRAY = f"it reads or writes far outside its arrays; {_NAMES_THE_LINE}"
_MEANINGS = {
    **dict.fromkeys((signal.SIGSEGV, signal.SIGBUS), _STRAY),
    signal.SIGFPE: f"it divides an integer by 0; {_NAMES_THE_LINE}",
}


class Executor:
    """Runs one setup, again and again, each time on fresh arrays."""

    def __init__(self, setup: Setup, device: Device) -> None:
        if not device.runs_kernels:
            raise ConfigError(f"the {device.name} device runs no kernels; use host or cuda")
        self.setup, self.device = setup, device

    def run(self, fill: Fill, options: HostOptions = ASCENDING) -> Outcome:
        """One run; `options` say how the host device goes about it. Errors of gate and compiler are raised."""
        seconds, fault, device = 0.0, None, self.device
        if device.name == "host":
            options = replace(options, shared_byte=fill.shared_byte)
            prepare(self.setup.kernel, self.setup.types, options)
            device = HostDevice(options)
            guarded, arrays = place(self.setup, device, fill, shared_bytes)
            seconds, fault = _in_child(lambda: launch_once(self.setup, arrays, device))
        else:
            guarded, arrays = place(self.setup, device, fill)
            try:
                seconds = launch_once(self.setup, arrays, device)
            except SegnetError:
                raise
            except Exception as error:  # CuPy raises the driver's errors as several kinds
                stopped = f"the GPU stopped: {type(error).__name__}: {error}"
                fault = f"{stopped}; --device host --sanitize may name the line. {_NO_MORE}"
                # The arrays as they were before a launch: nobody can look at them any more.
                return Outcome(place(self.setup, NumpyDevice(), FIRST)[1], [], 0.0, fault)
        damage = [report for reports in guarded.damage().values() for report in reports]
        found = {name: None if array is None else device.download(array) for name, array in arrays.items()}
        return Outcome(found, damage, seconds, fault)


def launch_once(setup: Setup, arrays: Mapping[str, Array | None], device: Device) -> float:
    """Launches on arrays of a device; seconds from launch to completion."""
    arguments = [arrays.get(p.name) if p.pointer else setup.scalars[p.name] for p in setup.kernel.parameters]
    device.synchronise()
    start = perf_counter()
    launch(device, setup.kernel, setup.grid, setup.block, arguments, setup.types, setup.shared)
    device.synchronise()
    return perf_counter() - start


def shared_bytes(size: int) -> np.ndarray:
    """Memory that a forked child shares with its parent."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def _in_child(work: Callable[[], float]) -> tuple[float, str | None]:
    """(seconds, fault) of a run in a forked process; errors that are no faults of the kernel are raised here."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # The child calls only the kernel's library, which needs none of the locks that other threads may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        # Ctrl-C waits until there is somebody to end the child; Python's own work after a fork would swallow it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _report(work, write_end)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if status < 0:
        number = signal.Signals(-status)
        meaning = _MEANINGS.get(number, "--sanitize (sanitize=True) may tell more")
        return 0.0, f"the kernel ended its process with {number.name}; {meaning}"
    report = json.loads(text)
    if report["error"] not in (None, "KernelFault"):
        raise getattr(errors, report["error"], SegnetError)(report["message"])
    return report["seconds"], report["message"]


def _report(work: Callable[[], float], pipe: int) -> None:
    """The child's part; it never returns, so that nothing of the parent (tests, buffers, threads) runs twice."""
    faulthandler.disable()  # the parent tells what a crash means
    report: dict[str, object] = {"seconds": 0.0, "error": None, "message": None}
    try:
        report["seconds"] = work()
    except BaseException as error:
        report.update(error=type(error).__name__, message=str(error))
    os.write(pipe, json.dumps(report).encode())
    ctypes.CDLL(None).fflush(None)  # what the kernel printed
    os._exit(0)
