"""The NVIDIA driver, the GPUs, CuPy and NVRTC: first the facts are gathered, then they are judged."""

import contextlib
import ctypes
import importlib.metadata
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segnet_scratch.lab.doctor.findings import Finding, first_lines, install_extra, last_line, pip

_OLDEST_CUDA = (12, 0)
_OLDEST_GPU = (7, 5)
_ON_THE_CPU = "segnet train --device numpy --data DIR --out RUN"
_GIVE_THE_CONTAINER = "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility ..."
_INSTALL_DRIVER = "sudo ubuntu-drivers install  # or the way of your system; version 525 or newer"


@dataclass(frozen=True)
class Facts:
    """What is known about everything between the kernels and a GPU."""

    cuda: tuple[int, int] | None = None  # the newest CUDA that the driver runs; None without a driver
    smi: str = ""  # what nvidia-smi says of driver and GPUs; empty where it is missing
    smi_problem: str = ""  # what it says instead
    on_the_bus: bool = False  # is there an NVIDIA display controller?
    hidden: str | None = None  # CUDA_VISIBLE_DEVICES
    packages: list[str] = field(default_factory=list)  # CuPy's, of which there must be one
    cupy: dict[str, Any] = field(default_factory=dict)  # device.cupy_facts(), or "error" and "type"
    nvrtc: dict[str, Any] = field(default_factory=dict)  # "version", "path" and "architectures", or "error"

    @staticmethod
    def gather(cupy: dict[str, Any], nvrtc: dict[str, Any]) -> "Facts":
        """`cupy` and `nvrtc` are answers of own_process.py."""
        cuda, hidden = _driver_cuda() or _version(cupy.get("driver", 0)), os.environ.get("CUDA_VISIBLE_DEVICES")
        names = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
        packages = sorted(name for name in names if name == "cupy" or name.startswith("cupy-"))
        return Facts(cuda, *_ask_nvidia_smi(), _is_on_the_bus(), hidden, packages, cupy, nvrtc)

    @property
    def extra(self) -> str:
        """The extra for this driver: cuda13, but cuda12 for a driver that knows CUDA 12 at most."""
        return "cuda12" if self.cuda is not None and self.cuda < (13, 0) else "cuda13"

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """Those that CuPy can use."""
        return self.cupy.get("gpus") or []


def _ask_nvidia_smi() -> tuple[str, str]:
    """(driver and GPUs, ""), ("", problem), or ("", "") where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", ""
    query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return "", str(error)
    output = "; ".join((result.stdout.strip() or result.stderr.strip()).splitlines())
    return (output, "") if result.returncode == 0 else ("", output or f"exit code {result.returncode}")


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs; None without a driver."""
    number = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return _version(number.value)


def _version(number: int) -> tuple[int, int] | None:
    """(13, 2) for CUDA's 13020; None for 0."""
    return (number // 1000, number % 1000 // 10) if number else None


def _is_on_the_bus() -> bool:
    """Does Linux list a display controller (class 03) made by NVIDIA (vendor 10de)?"""
    with contextlib.suppress(OSError):
        for device in Path("/sys/bus/pci/devices").glob("*"):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def findings(facts: Facts) -> list[Finding]:
    """Driver, GPUs, CuPy, NVRTC."""
    driver = _driver(facts)
    return [driver, *_gpus(facts, driver.status == "ok"), _cupy(facts), _nvrtc(facts)]


def _driver(facts: Facts) -> Finding:
    if facts.cuda is not None:
        text = f"CUDA {facts.cuda[0]}.{facts.cuda[1]}; nvidia-smi: {facts.smi or facts.smi_problem or 'not there'}"
        if facts.cuda < _OLDEST_CUDA:
            return Finding("driver", "broken", f"{text}; too old: CUDA 12 or newer is needed", _INSTALL_DRIVER)
        return Finding("driver", "ok", text)
    if facts.smi:
        text = f"nvidia-smi: {facts.smi}; but libcuda.so.1 does not load: a container without the right to compute?"
        return Finding("driver", "broken", text, _GIVE_THE_CONTAINER)
    if facts.smi_problem:
        # After an update the running kernel still has the old driver.
        fix = "sudo reboot" if "mismatch" in facts.smi_problem else "sudo modprobe nvidia  # or install it again"
        return Finding("driver", "broken", f"nvidia-smi: {last_line(facts.smi_problem)}", fix)
    if facts.on_the_bus:
        text = "none, but an NVIDIA GPU is in this machine (a container must be started with --gpus all)"
        return Finding("driver", "missing", text, _INSTALL_DRIVER)
    return Finding("driver", "missing", "none, and no NVIDIA GPU that could use one: train on the CPU", _ON_THE_CPU)


def _gpus(facts: Facts, driver: bool) -> list[Finding]:
    found = []
    for gpu in facts.gpus:
        major, minor = gpu["capability"]
        text = f"{gpu['name']}, compute capability {major}.{minor}, {gpu['bytes'] / 2**30:.0f} GiB"
        old = f"{text}; too old: 7.5 (Turing) or newer is needed", _ON_THE_CPU
        is_old = (major, minor) < _OLDEST_GPU
        found.append(Finding("GPU", "broken", *old) if is_old else Finding("GPU", "ok", text))
    if found:
        return found
    if not driver:
        return [Finding("GPU", "missing", "none can be used without the driver")]
    if facts.hidden is not None:
        text = f"CUDA_VISIBLE_DEVICES is '{facts.hidden}', which may hide the GPU"
        return [Finding("GPU", "missing", text, "unset CUDA_VISIBLE_DEVICES")]
    if "version" in facts.cupy:
        problem = last_line(facts.cupy["problem"] or "it finds no GPU")
        return [Finding("GPU", "missing", f"none that CuPy can use: {problem}", "nvidia-smi")]
    return [Finding("GPU", "ok" if facts.smi else "missing", "what it can do is known once CuPy is there")]


def _cupy(facts: Facts) -> Finding:
    install = install_extra(facts.extra)
    replace = f"{pip('uninstall', '-y', *facts.packages)} && {install}" if facts.packages else install
    if len(facts.packages) > 1:
        text = f"{' and '.join(facts.packages)} are both installed and overwrite each other"
        return Finding("CuPy", "broken", text, replace)
    if "error" in facts.cupy:
        if facts.cupy.get("type") == "ModuleNotFoundError" and not facts.packages:
            needed = "the cuda device needs it" if facts.cuda else "only the cuda device needs it, with a GPU"
            return Finding("CuPy", "missing", f"not installed; {needed}", install)
        return Finding("CuPy", "broken", f"does not import: {last_line(facts.cupy['error'])}", replace)
    built = _version(facts.cupy["runtime"]) or (0, 0)
    text = f"{facts.cupy['version']} for CUDA {built[0]}"
    if facts.cuda is not None and built[0] > facts.cuda[0]:
        return Finding("CuPy", "broken", f"{text}, but the driver runs CUDA {facts.cuda[0]} at most", replace)
    return Finding("CuPy", "ok", text)


def _nvrtc(facts: Facts) -> Finding:
    fix = install_extra(facts.extra if facts.cuda else "nvrtc")
    if "error" in facts.nvrtc:
        if "was not found" in facts.nvrtc["error"]:
            text = "libnvrtc, which compiles the kernels for a GPU, and for `segnet doctor --kernels` without one"
            return Finding("NVRTC", "missing", text, fix)
        return Finding("NVRTC", "broken", last_line(facts.nvrtc["error"]), fix)
    major, minor = facts.nvrtc["version"]
    text = f"{major}.{minor}, {facts.nvrtc['path']}"
    unknown = {"sm_{}{}".format(*gpu["capability"]) for gpu in facts.gpus} - set(facts.nvrtc["architectures"])
    if unknown:
        return Finding("NVRTC", "broken", f"{text}, does not know {', '.join(sorted(unknown))}", fix)
    if facts.cuda is not None and major > facts.cuda[0]:
        return Finding("NVRTC", "broken", f"{text}, but the driver runs CUDA {facts.cuda[0]} at most", fix)
    return Finding("NVRTC", "ok", text)


def cuda_device(answer: dict[str, Any] | None) -> Finding:
    """Did a kernel run on the GPU? `answer` is that of the process that tried; None where there is no GPU to try."""
    if answer is None:
        return Finding("cuda device", "missing", "no GPU that CuPy can use, see above")
    if "error" in answer:
        return Finding("cuda device", "broken", f"{first_lines(answer['error'])}; see above")
    return Finding("cuda device", "ok", "compiled and ran a kernel; trains on the GPU")
